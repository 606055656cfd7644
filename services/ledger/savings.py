"""What was not spent because of prompt caching and of tiers, in nano-USD. Pure; what the answer cache saved comes with the record.

Both compare what a call did cost with what the same tokens would have cost otherwise, and are negative where it would have been less.
"""

from services.chassis.money import Price, Usage


def prompt_cache_saved_nanousd(price: Price, usage: Usage) -> int:
    """Cost of the call had every prompt token been plain input, minus its cost: what reads saved, less what writes cost on top."""
    plain = Usage(input_tokens=usage.prompt_tokens, output_tokens=usage.output_tokens)
    return price.cost_nanousd(plain) - price.cost_nanousd(usage)


def tiering_saved_nanousd(price: Price, baseline: Price, usage: Usage) -> int:
    """Cost of the same tokens at the baseline model, minus the call's cost. Tokens of another provider are no measure: 0."""
    if price.provider != baseline.provider:
        return 0
    return baseline.cost_nanousd(usage) - price.cost_nanousd(usage)
