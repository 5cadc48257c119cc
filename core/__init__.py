"""The house, in reading order.

messages (the nouns) -> chat (the one path) -> queue, window, text, tokenizer -> courier -> journal -> engine -> app.
"""
