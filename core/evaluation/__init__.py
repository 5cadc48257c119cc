"""How good the replies are: `metrics` over texts, `selfchat` over long talks, `recall` over what was told."""
