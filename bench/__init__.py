"""Measures what Tailrace adds to a provider call; the provider simulator is shared with the tests. Nothing here is part of the product."""
