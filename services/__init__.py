"""Four services that together answer questions: `gateway` is the edge, `orchestrator` runs the chain of one answer,
`retrieval` is memory, `ledger` keeps people and money. They know each other only through `protos/`."""
