"""Money arithmetic in integers: tokens times price is nano-USD. No float and no rounding in the caller's favour."""

from dataclasses import dataclass

MTOK = 1_000_000


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens by kind; no token is counted in two fields. See tailrace.common.v1.Usage."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0

    def __post_init__(self) -> None:
        counts = (self.input_tokens, self.output_tokens, self.cache_read_tokens, self.cache_write_tokens, self.cache_write_1h_tokens)
        if min(counts) < 0 or self.cache_write_1h_tokens > self.cache_write_tokens:
            raise ValueError(f"impossible token counts: {counts}")

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_read_tokens + other.cache_read_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
            self.cache_write_1h_tokens + other.cache_write_1h_tokens,
        )

    @property
    def prompt_tokens(self) -> int:
        """All tokens of the prompt, however they were billed."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_tokens


@dataclass(frozen=True, slots=True)
class Price:
    """nano-USD per million tokens; see tailrace.common.v1.Price for each field."""

    provider: str
    model: str
    version: int = 1
    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    long_context_above_tokens: int = 0
    long_input: int = 0
    long_output: int = 0
    source: str = ""

    def cost_nanousd(self, usage: Usage) -> int:
        """Cost of one provider call, rounded up once to a whole nano-USD.

        Above the long-context bound every prompt token pays the long price, cached ones in proportion.
        """
        write_5m = usage.cache_write_tokens - usage.cache_write_1h_tokens
        prompt = (
            usage.input_tokens * self.input
            + usage.cache_read_tokens * self.cache_read
            + write_5m * self.cache_write_5m
            + usage.cache_write_1h_tokens * self.cache_write_1h
        )
        output = usage.output_tokens * self.output
        if 0 < self.long_context_above_tokens < usage.prompt_tokens:
            prompt = -(-prompt * self.long_input // self.input) if self.input else usage.prompt_tokens * self.long_input
            output = usage.output_tokens * self.long_output
        return -(-(prompt + output) // MTOK)

    def worst_case_nanousd(self, input_tokens_max: int, output_tokens_max: int) -> int:
        """Most that a call within these bounds can cost, whichever way its prompt tokens are billed."""
        prompt, output_token = self.worst_case_parts(input_tokens_max)
        return -(-(prompt + output_tokens_max * output_token) // MTOK)

    def worst_case_parts(self, input_tokens_max: int) -> tuple[int, int]:
        """Most that a prompt within this bound, and each token generated from it, can cost, in millionths of a nano-USD."""
        dearest_kind = max(self.input, self.cache_read, self.cache_write_5m, self.cache_write_1h)
        prompt, output_token = input_tokens_max * dearest_kind, self.output
        if 0 < self.long_context_above_tokens < input_tokens_max:
            scaled = -(-prompt * self.long_input // self.input) if self.input else input_tokens_max * self.long_input
            prompt, output_token = max(prompt, scaled), max(output_token, self.long_output)
        return prompt, output_token
