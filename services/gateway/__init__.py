"""The edge: who are you, may you, and one gRPC stream to one HTTP stream. No prompts, no budget arithmetic, no vectors."""
