"""How good the replies are: `metrics`, `selfchat` over long talks, `recall` of what was told; `fidelity` of precisions."""
