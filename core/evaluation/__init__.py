"""How good the replies are: `metrics`, `selfchat` over long talks, `recall` of things told, `fidelity` of int8."""
