"""From ids to ids. In reading order:

base           the contract: requests, replies, refusals
torch_engine   the engine in this process: one thread, step after step
futures        how that thread answers the event loop
scheduler      who runs in the next step
kv_cache       who owns which keys and values, in tokens
sequence       what is being generated
guesses        what may come next, tried in the same step
model_runner   one step
model          GPT-2 in torch
sampler        from logits to tokens
draft          a copy in int8 that guesses for a large model
judge          which candidate answers what was said, and not just anything
config         what config.json says
weights        a checkpoint's tensors, checked

That is the hour. To be read when they are needed:

native/        the model in C++
graphs         the model on a GPU: a step is one graph
kernels        what the graph is of, in Triton
choice         at start, which model computes here
checks         does it compute what it must?
reference      the model written down plainly, which a precision is held against
hub            from a model's name to its folder
machine        what cores and memory this process may use
echo_engine    says it back, without a model
wire           requests, replies and refusals as JSON
server         an engine behind HTTP
child          the process in which it serves
process        starts that and keeps it alive
folder         where their socket is
http_engine    the engine at the other end
ray_serve      many servers behind one address
"""
