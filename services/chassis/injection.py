"""Passages and tools' results that read like instructions to the model instead of material for it, told by what they say. Pure, bounded,
and no proof.

What is found is shown with the text and keeps an answer out of the cache; nothing relies on it. The fence around material does not
ask what is in it, tools are granted by policy, and a text without a flag is trusted no more than one with.
"""

import re
import unicodedata
from collections.abc import Iterator

TEXT_CHARACTERS_MAX = 20_000
"""Of one passage; several times the largest chunk. A longer text is looked at in such parts."""
SENTENCE_CHARACTERS_MAX = 600
INVISIBLE_MIN = 3
"""So many characters nobody sees are no accident. One or two may be what a copy from a web page left."""

# Tags (used to hide whole sentences in plain sight), overrides of the writing direction, and zero-width characters inside words.
_HIDDEN = re.compile("[\U000e0000-\U000e007f\u202d\u202e]|(?<=\\w)[\u200b\u2060-\u2064\ufeff]+(?=\\w)")
_FLAG_EMOJI = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")
_WORD_BREAKERS = re.compile("[\U000e0000-\U000e007f\u00ad\u200b-\u200f\u2060-\u2064\ufeff\u202a-\u202e\u2066-\u2069]")
_SPACE = re.compile(r"\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?:;。！？])\s+|\n+|(?<=[。！？])")

_EARLIER = r"(?:previous|prior|preceding|above|earlier|foregoing|initial|original|system|existing|all|any|other|your)"
_ORDERS = r"(?:instructions?|prompts?|directives?|guidelines?|rules?|commands?|orders|context|directions)"
_OVERRIDE = re.compile(
    rf"\b(?:ignore|disregard|forget|override|overwrite|bypass|skip|discard|drop|neglect|do not (?:follow|obey)|stop following)\b"
    rf"(?:\s+\w+){{0,3}}?\s+{_EARLIER}\b(?:\s+\w+){{0,3}}?\s+{_ORDERS}\b"
    rf"|\b(?:ignore|disregard|forget)\s+(?:everything|anything|all)\s+(?:above|before|prior|previously|you (?:were"
    rf"|have been) told|that (?:came|was))"
    rf"|\b(?:new|updated|real|actual)\s+(?:system\s+)?{_ORDERS}\s*(?:follow|:)"
    r"|\bignorier\w*\s+(?:sie\s+)?(?:bitte\s+)?(?:alle\s+)?(?:vorherig\w*|bisherig\w*|obig\w*)\s+anweisung"
    r"|\bignor[ae]\w*\s+(?:todas?\s+)?las?\s+(?:instrucci\w+|indicaci\w+)|\bignorez\s+(?:toutes\s+)?(?:les"
    r"|vos)\s+(?:instructions|consignes)"
    r"|\bignora\s+(?:tutte\s+)?le\s+istruzioni|\bignore\s+(?:todas\s+)?as\s+instru\w+"
    r"|忽略(?:之前|以上|上述|先前|所有)[^。]{0,8}(?:指令|指示|说明|提示)|(?:以前|上記|これまで)の(?:指示|命令)を(?:すべて)?無視"
    r"|игнорируй\w*\s+(?:все\s+)?(?:предыдущ|прежн|вышеуказанн)\w*\s+(?:инструкц|указан)",
)
_PROMPT_LEAK = re.compile(
    r"\b(?:show|reveal|print|output|repeat|display|give|tell|share|provide|continue|say|disclose|expose|leak|encode"
    r"|translate|echo|dump|list|write|see|what(?:'s| is| are| were))\b"
    r"(?:[\s:,']+\w+){0,5}?[\s:,'(]+(?:(?:system|initial|hidden|starting|original|developer|internal)\s+(?:prompts?"
    r"|instructions?|messages?|configuration|rules)"
    r"|system_?prompt|this (?:entire )?conversation|your\s+(?:\w+\s+)?(?:instructions|prompt)|those instructions"
    r"|instructions you were given|text (?:above|you were given))\b"
    r"|<system_prompt>|\bi was instructed to\b|\bmy instructions are\b|\bnot supposed to tell\b|\boutput initialization string\b",
)
_ROLE = re.compile(
    r"\byou are now (?:an?|the|my|in|acting|called|known)\s+(?!member|part|position)|\byou are no longer (?:bound|restricted"
    r"|limited|an? (?:ai|assistant|chatbot))\b|\bfrom now on,?\s+(?:you|your|act|respond|answer|pretend)\b"
    r"|\b(?:pretend|act|behave)\s+(?:to be|as if you|as though you|like you|as an? (?:ai|unrestricted|different|evil))\b"
    r"|\b(?:you(?:'re| are) (?:now )?in|enter|activate|switch to)\s+(?:\w+\s+)?(?:developer|maintenance|debug|god|jailbreak"
    r"|dan|unrestricted|admin(?:istrator)?)\s+mode\b|\badmin(?:istrator)? override\b"
    r"|\bas an? (?:ai|large|language) (?:language )?(?:model|assistant),?\s+you\b|\b(?:attention|note to|message (?:to|for)"
    r"|instructions? (?:to|for))\s+(?:the\s+)?(?:ai|llms?|assistants?|chatbots?|language models?)\b",
)
_MARKUP = re.compile(
    r"<\|(?:im_start|im_end|system|user|assistant|endoftext|eot_id|start_header_id)\|?>|\[/?inst\]|<</?sys>>|</?(?:passages?"
    r"|question|documents?_context)\b[^>\n]{0,80}>"
    r"|^\s*#{0,4}\s*(?:system|assistant)\s*(?:prompt|message)?\s*:\s*you\b",
    re.MULTILINE,
)
_EXFILTRATION = re.compile(
    r"!\[[^\]\n]{0,200}\]\(\s*https?://[^)\s]{0,300}[?&/=](?:\{|%7b|<|\[|\$|data|prompt|history|context|secret|token)"
    r"|\b(?:send|post|upload|forward|transmit|exfiltrate|e-?mail)\s+(?:\w+\s+){0,4}?(?:conversation|chat|history|prompts?"
    r"|context|secrets?|credentials?|api keys?|passwords?|user'?s? data)\s+(?:\w+\s+){0,3}?to\b",
)
_REPLY = r"(?:answers?|responses?|repl(?:y|ies)|outputs?|generated text|completion)"
_YOUR_REPLY = re.compile(
    rf"\b(?:in|to|into|within|of|for|with|from|throughout|before|after|as|at the (?:start|end|beginning) of"
    rf"|through)?\s*(?:your|thy)\s+(?:\w+\s+){{0,2}}?{_REPLY}\b(?!\s+(?:to (?:this|our|the|my)|variable|code|header|time"
    rf"|rate))"
)
_TOLD = re.compile(
    r"^(?:(?:please|also|and|then|now|next|finally|additionally|always|never|instead|additionally|furthermore|moreover"
    r"|rather|just|you (?:must|should|will|shall|have to|need to)(?: also| always| never| only)?|do not|don't"
    r"|make sure (?:to|you|that)|be sure to|ensure(?: that| to)?|remember to|first|important|warning|note)\b[,:]?\s+){0,3}"
    r"(?:in (?:your|the) \w+,?\s+)?"
    r"(?:add|include|insert|append|prepend|integrate|incorporate|modify|augment|enhance|replace|convert|substitute|use"
    r"|provide|give|write|respond|answer|reply|rewrite|rephrase|encode|encrypt|decode|cipher|translate|reverse|remove|omit"
    r"|delete"
    r"|group|combine|split|scramble|jumble|shuffle|misspell|misspelling|rearrange|anagram|introduce|render|express|mention"
    r"|start|begin|end|finish|conclude|close|keep|limit|repeat|return|print|output|tease|suggest|recommend|promote|format"
    r"|present|make|avoid|refuse|say|tell|state"
    r"|craft|compose|deliver|change|alter|transform|turn|switch|swap|shift|apply|employ|put|place|embed|weave|blend|inject"
    r"|sprinkle|utilize|invert|flip|capitalize|highlight|emphasize|infuse|enclose|wrap|prefix|suffix|generate|create|produce"
    r"|share|display|show|supplement|adapt|adjust|structure|ensure|reference|link|cite|invite|ask|encourage|urge|remind"
    r"|advertise|advise|claim|imply|hint|finish)\b"
)
_TOLD_HOW = re.compile(
    rf"\b(?:respond|reply|answer)\s+(?:only|exclusively|solely|always|just|strictly|directly)?\s*(?:with|in|using|by"
    rf"|as)\b(?=.*\b(?:only|words?|letters?|base64|morse|emojis?|rot13|caesar|cipher|uppercase|lowercase|json|rhymes?|french"
    rf"|german|spanish|chinese|japanese|latin|russian|italian)\b)"
    rf"|\byour\s+(?:\w+\s+){{0,2}}?{_REPLY}\s+(?:must|should|shall|has to|needs to|is to|will)\b"
    r"|\b(?:do not|don't|never)\s+(?:tell|inform|mention (?:this|it|these) to|reveal (?:this|it|these) to"
    r"|alert)\s+(?:the\s+)?(?:user|reader|human|person)\b"
    r"|\b(?:tell|inform|convince|persuade|instruct|urge|direct|ask)\s+the\s+(?:user|human)\s+(?:to|that)\b"
)
_CODE_PART = (
    r"(?:code|script|snippet|program|function)(?:\s+(?:snippets?|blocks?|excerpts?|sections?|segments?|fragments?|lines?"
    r"|parts?))?"
)
_CODE_ORDER = re.compile(
    rf"\b(?:following|subsequent|below|accompanying|succeeding|ensuing|given|provided"
    rf"|attached)\s+{_CODE_PART}\b.{{0,200}}\b(?:your|the)\s+(?:\w+\s+){{0,2}}?(?:code(?:base)?|algorithm|solution"
    rf"|implementation|responses?|answers?|elucidation|explanation|project|work|script|program|reply|output)\b"
    rf"|\byour\s+(?:code|algorithm|response|answer|solution|implementation|reply)\b.{{0,200}}\b(?:following|subsequent)\s+{_CODE_PART}\b"
    rf"|\b(?:don't hesitate|don't forget|feel free)\s+to\b.{{0,80}}\b(?:following|subsequent)\s+{_CODE_PART}\b"
    rf"|\b(?:execute|run)\s+the\s+following\s+{_CODE_PART}\s+in\s+the\s+code\s+you\b"
)
_RISKY_CODE = re.compile(
    r"\b(?:os\.environ|getenv|subprocess|os\.(?:system|rename|remove|popen|walk)|shutil\.|cookiejar|http\.cookies"
    r"|from http import cookies|ftplib|smtplib|socket\.socket|psutil|pexpect|usb\.core|winreg|ctypes|urlretrieve|eval\("
    r"|exec\(|base64\.b64|curl\s+-|wget\s|requests\.(?:post|get)|http\.client|paramiko|pynput|keyboard|scapy|netifaces"
    r"|platform\.|glob\.glob|pyautogui|bluetooth|wmi)",
    re.IGNORECASE,
)


def flags_of(text: str) -> tuple[str, ...]:
    """What makes `text` look like an instruction, in alphabetical order; empty = nothing was seen.

    `override` (earlier instructions are to be ignored), `prompt_leak` (the prompt is asked for), `role` (a new role or mode), `markup`
    (pretends to be the prompt's own structure), `exfiltration` (sends what the model knows elsewhere), `reply_order` (says how to
    reply), `code_order` (wants suspicious code in the reply), `invisible` (text that people cannot see). A few hundred microseconds.
    """
    text = text[:TEXT_CHARACTERS_MAX]
    seen = {"invisible"} if len(_HIDDEN.findall(_FLAG_EMOJI.sub("", text))) >= INVISIBLE_MIN else set()
    plain = _plain(text)
    for name, pattern in (("override", _OVERRIDE), ("prompt_leak", _PROMPT_LEAK), ("role", _ROLE), ("markup", _MARKUP)):
        if pattern.search(plain):
            seen.add(name)
    if _EXFILTRATION.search(plain):
        seen.add("exfiltration")
    for sentence in _sentences(plain):
        if _TOLD_HOW.search(sentence) or (_TOLD.match(sentence) and _YOUR_REPLY.search(sentence)):
            seen.add("reply_order")
        if _CODE_ORDER.search(sentence) and _RISKY_CODE.search(text):
            seen.add("code_order")
    return tuple(sorted(seen))


def flags_of_long(text: str) -> tuple[str, ...]:
    """`flags_of` for a text of any length, whose parts overlap by a sentence: an order is not hidden by being far down. Linear time."""
    seen: set[str] = set()
    step = TEXT_CHARACTERS_MAX - SENTENCE_CHARACTERS_MAX
    for begin in range(0, max(1, len(text) - SENTENCE_CHARACTERS_MAX), step):
        seen.update(flags_of(text[begin : begin + TEXT_CHARACTERS_MAX]))
    return tuple(sorted(seen))


def _plain(text: str) -> str:
    """Lower case, in compatibility forms, without what only hides words from a reader of patterns."""
    return unicodedata.normalize("NFKC", _WORD_BREAKERS.sub("", text)).lower().replace("’", "'")


def _sentences(plain: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(plain):
        stripped = _SPACE.sub(" ", sentence).strip(" \t-*>•\"'|")
        if stripped:
            yield stripped[:SENTENCE_CHARACTERS_MAX]
