"""How hard a question looks: a score from what can be seen in its words, each part with a weight and a name. Pure; no model is asked.

It looks at the question alone: models are chosen before anything is searched, because the answer cache has to know the tier.
"""

import re
from collections.abc import Mapping

from services.orchestrator.standalone import language

# What asks for thought: reasons, comparisons, estimates, things to be made. English, German, Spanish, French.
_REASONING = re.compile(
    r"\b(?:why|how (?:do|does|did|can|could|would|might|should|come)|explain|compare|contrast|differ(?:s|ences?)?|pros and cons"
    r"|trade-?offs?|versus|vs|analy[sz]e|evaluate|assess|argue|discuss|prove|derive|estimate|calculate|solve|determine|infer|reasons?|causes?|impact"
    r"|implications?|consequences|advantages|relationship"
    r"|warum|wieso|weshalb|erkläre|vergleiche?|unterschied\w*|begründe|berechne|beweise|schätze|bewerte|vor- und nachteile"
    r"|por qué|explica|compara|diferencias?|calcula|demuestra|estima|pourquoi|explique[rz]?|compare[rz]?|différences?|calcule[rz]?)\b"
)
_MAKING = re.compile(
    r"\b(?:write|compose|draft|design|implement|develop|create|build|craft|rewrite|refactor|translate|summari[sz]e|outline|plan"
    r"|schreibe?|entwirf|entwickle|implementiere|erstelle|übersetze|fasse zusammen|escribe|diseña|implementa|traduce|résume"
    r"|écris|conçois|implémente|traduis)\b"
)
_SUPPOSING = re.compile(
    r"\b(?:if|suppose|supposing|imagine|assume|what would|would have|might have|could have|pretend|given that|as an?"
    r"|angenommen|falls|wenn|stell dir vor|supongamos|imagina|supposons|imagine[rz]?)\b"
)
_CODE = re.compile(
    r"```|`[^`\n]+`|\b(?:def|class|SELECT|algorithm|function|regex|sql|python|java|javascript|c\+\+|rust|program|code|script)\b|[{};]\s*\n|=>|=="
)
_CLAUSE = re.compile(r"[,;:]|\b(?:and|or|but|that|which|who|while|because|und|oder|aber|dass|weil|y|o|que|porque|et|ou|mais|parce)\b")
_PART = re.compile(r"[?؟？]|[.!](?=\s+\w)|^\s*(?:\d+[.)]|[-*])\s", re.MULTILINE)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"\w+")

WEIGHTS: Mapping[str, float] = {
    "length": 0.25,
    "clauses": 0.15,
    "parts": 0.15,
    "reasoning": 0.25,
    "making": 0.35,
    "supposing": 0.25,
    "code": 0.25,
    "numbers": 0.10,
    "unknown_language": 0.10,
}
"""How much each feature adds at its fullest. Set by hand so that a plain look-up stays below 0.3 and what asks for thought or work is
above it; docs/models.md says how well that was seen to tell them apart."""
WORDS_FULL, CLAUSES_FULL, PARTS_FULL, NUMBERS_FULL = 50, 6, 3, 4
"""Counts at which a feature is at its fullest."""
CHARACTERS_READ_MAX = 8_192
"""What a longer question says beyond does not make it look harder: it is at its longest already."""


def features_of(question: str) -> dict[str, float]:
    """Each feature of `WEIGHTS`, from 0 to 1."""
    read = question[:CHARACTERS_READ_MAX]
    folded = read.casefold()
    words = len(_WORD.findall(read))
    parts = len(_PART.findall(read.strip()))
    return {
        "length": min(1.0, words / WORDS_FULL),
        "clauses": min(1.0, len(_CLAUSE.findall(folded)) / CLAUSES_FULL),
        "parts": min(1.0, max(0, parts - 1) / (PARTS_FULL - 1)),
        "reasoning": float(_REASONING.search(folded) is not None),
        "making": float(_MAKING.search(folded) is not None),
        "supposing": float(_SUPPOSING.search(folded) is not None),
        "code": float(_CODE.search(read) is not None),
        "numbers": min(1.0, len(_NUMBER.findall(read)) / NUMBERS_FULL),
        # The words above are not known in it, so that nothing can be seen: in doubt it is harder.
        "unknown_language": float(language(read) not in ("en", "de", "es", "fr", "none", "latin")),
    }


def difficulty_of(question: str) -> float:
    """How hard `question` looks, from 0 to 1 with two digits."""
    return round(min(1.0, sum(WEIGHTS[name] * value for name, value in features_of(question).items())), 2)
