"""People and money: users, plans, budgets, holds, operations and prices, in PostgreSQL. No prompts, no models, no vectors."""
