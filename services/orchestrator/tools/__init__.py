"""Tools that a model may call: which there are, how a call is checked and made, the rounds between both. No provider is known."""
