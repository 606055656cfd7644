"""The words the guards know, as data. Nothing is decided here."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _groups(text: str) -> dict[str, str]:
    """Every word of a line by the line's first word."""
    return {word: line.split()[0] for line in text.strip().splitlines() for word in line.split()}


CONTRACTIONS = (
    (r"\b(can)not\b", r"\1 not"),
    (r"\bcan[’']?t\b", "can not"),
    (r"\bwon[’']t\b", "will not"),
    (r"\bshan[’']t\b", "shall not"),
    (r"\b(do|does|did|is|are|was|were|has|have|had|could|would|should|must|need)n[’']?t\b", r"\1 not"),
    (r"\b(what|who|where|when|how|why|that|there|it|he|she|here|let)[’']?s\b(?<!\bhes)(?<!\bits)(?<!\blets)(?<!\bheres)", r"\1 is"),
    (r"\b(\w+)[’']re\b", r"\1 are"),
    (r"\b(\w+)[’']ve\b", r"\1 have"),
    (r"\b(\w+)[’']ll\b", r"\1 will"),
    (r"\b(i)[’']m\b", r"\1 am"),
    (r"\b(\w+)[’']d\b", r"\1 would"),
    (r"(\w)[’']s\b", r"\1 s"),
    (r"\bdo (?:we|people) know\b", "is known"),
)

NEGATIONS = _words(
    "not no never none neither nor without nothing nobody nowhere hardly barely lacking lack except excluding nicht kein "
    "keine keinen ohne nie ne pas jamais sans sin nunca ningún non senza mai"
)

FUNCTION_WORDS = _words(
    "a an the that those there here s of in on at for by with about as to if so then just also too be is are am was were "
    "been being do does did doing done have has had having i you we one it its me us can could may might shall should will "
    "would must ought let what which who whom whose when where why how any into upon regarding concerning"
)
"""Dropped from the content; what some of them say is kept in `kind`, `tense` and the order of the rest."""

FILLERS = _words(
    "please kindly exactly actually really basically simply hello hi hey thanks thank mean meaning means meant some someone "
    "somebody anyone anybody way ways"
)
"""Dropped when something else is left."""

POINTING = _words("this these following aforementioned attached")
"""Words that point at something outside the question; two such questions point at different things."""

DATE_WORDS = _words(
    "january february march april may june july august september october november december jan feb mar apr jun jul aug sep "
    "sept oct nov dec monday tuesday wednesday thursday friday saturday sunday today yesterday tomorrow tonight now weekend "
    "weekday morning noon afternoon evening night midnight spring summer autumn fall winter annual annually yearly monthly "
    "weekly daily hourly quarterly"
)

# fmt: off
NUMBER_WORDS = {
    "zero": "0", "two": "2", "twice": "2", "three": "3", "third": "3", "four": "4", "fourth": "4", "five": "5", "fifth": "5",
    "six": "6", "sixth": "6", "seven": "7", "seventh": "7", "eight": "8", "eighth": "8", "nine": "9", "ninth": "9", "ten": "10",
    "tenth": "10", "eleven": "11", "twelve": "12", "thirteen": "13", "fourteen": "14", "fifteen": "15", "sixteen": "16",
    "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20", "thirty": "30", "forty": "40", "fifty": "50",
    "sixty": "60", "seventy": "70", "eighty": "80", "ninety": "90", "hundred": "100", "thousand": "1000", "million": "1000000",
    "billion": "1000000000", "trillion": "1000000000000", "half": "1/2", "double": "2", "triple": "3", "dozen": "12", "once": "1",
    "quarter": "1/4",
}
# fmt: on
"""`one`, `first` and `second` are missing: they are more often no number."""

UNITS = _groups(
    """
    ms millisecond milliseconds msec
    second seconds sec secs
    minute minutes min mins
    hour hours hr hrs
    day days
    week weeks
    month months
    year years yr yrs
    mm millimeter millimeters millimetre millimetres
    cm centimeter centimeters centimetre centimetres
    meter meters metre metres
    km kilometer kilometers kilometre kilometres
    inch inches
    foot feet ft
    yard yards
    mile miles
    mg milligram milligrams
    gram grams
    kg kilogram kilograms kilo kilos
    lb lbs pound pounds
    oz ounce ounces
    ml milliliter milliliters millilitre millilitres
    liter liters litre litres
    gallon gallons
    kb kilobyte kilobytes kib
    mb megabyte megabytes mib
    gb gigabyte gigabytes gib
    tb terabyte terabytes tib
    celsius centigrade
    fahrenheit
    kelvin
    percent percentage %
    usd dollar dollars $
    eur euro euros €
    gbp £
    inr rupee rupees rs ₹
    yen ¥
    watt watts
    kw kilowatt kilowatts
    volt volts
    mph
    kmh kph
    """
)

SYNONYMS = _groups(
    """
    begin start commence
    buy purchase
    big large huge
    fix repair resolve
    get obtain acquire
    error failure
    remove delete erase
    make create
    pick choose select
    film movie
    picture photo image
    job career
    quick fast rapid
    phone smartphone mobile
    earn gain
    method approach technique
    build construct
    change modify alter
    difference differ different distinction
    cause reason
    show display
    use utilize utilise usage
    configure setup
    default
    versus vs v
    application app
    documentation docs doc
    repository repo
    parameter param argument
    directory folder
    maximum max
    minimum min
    """
)

LEMMAS = {
    form: line.split()[0]
    for line in """
    know known knew knows
    go went gone goes
    make made makes
    take took taken
    get got gotten
    give gave given
    write wrote written
    choose chose chosen
    buy bought
    build built
    lose lost
    find found
    win won
    think thought
    teach taught
    sell sold
    send sent
    run ran
    begin began begun
    speak spoke spoken
    become became
    leave left
    hold held
    keep kept
    feel felt
    meet met
    pay paid
    child children
    man men
    woman women
    person persons
    foot feet
    tooth teeth
    mouse mice
    index indices indexes
    matrix matrices
    life lives
    wife wives
    """.strip().splitlines()
    for form in line.split()
}

_ANTONYM_PAIRS = """
increase decrease|increase reduce|raise lower|rise fall|gain lose|win lose|add remove|add subtract|insert delete
enable disable|allow deny|allow forbid|allow prevent|permit prohibit|accept reject|accept decline|open close|start stop
start end|begin end|begin finish|create destroy|create delete|install uninstall|import export|upload download|encrypt decrypt
encode decode|compress decompress|lock unlock|connect disconnect|push pull|buy sell|lend borrow|send receive|give take
read write|load save|load unload|attach detach|mount unmount|show hide|expand collapse|include exclude|before after
above below|over under|inside outside|in out|up down|on off|left right|front back|top bottom|first last|early late
earlier later|next previous|old new|oldest newest|young old|high low|higher lower|highest lowest|more less|more fewer
most least|most fewest|maximum minimum|big small|large small|bigger smaller|larger smaller|largest smallest|biggest smallest
long short|longer shorter|longest shortest|tall short|fast slow|faster slower|fastest slowest|heavy light|hot cold|warm cool
wet dry|hard soft|hard easy|difficult easy|strong weak|rich poor|cheap expensive|good bad|better worse|best worst|right wrong
true false|positive negative|safe dangerous|safe unsafe|legal illegal|public private|internal external|input output
client server|source target|parent child|male female|man woman|men women|boy girl|husband wife|father mother|brother sister
son daughter|king queen|boyfriend girlfriend|lender borrower|employer employee|teacher student|doctor patient|buyer seller
landlord tenant|north south|east west|day night|summer winter|morning evening|past future|future past|birth death|born die
live die|love hate|like dislike|like hate|advantage disadvantage|pro con|benefit risk|benefit drawback|strength weakness
profit loss|income expense|asset liability|debit credit|hire fire|success failure|succeed fail|pass fail|possible impossible
always never|with without|same different|similar different|same opposite|local remote|local global|sync async
synchronous asynchronous|static dynamic|manual automatic|required optional|online offline|active inactive|visible invisible
odd even|ascending descending|horizontal vertical|forward backward|gross net|free paid|fresh stale|empty full|thick thin
wide narrow|deep shallow|arrive leave|arrive depart|enter exit|enter leave|lose find|remember forget|teach learn|ask answer
cause prevent|cause cure|help harm|attack defend
"""
ANTONYMS = frozenset(frozenset(pair.split()) for pair in _ANTONYM_PAIRS.replace("\n", "|").split("|") if pair.strip())

SYMMETRIC = _words("and or versus")
"""Words whose two sides may change places."""

LANGUAGE_WORDS = {
    "en": _words("the is are of to and in what how do does who when where why which can for with that it was this from an by should my me"),
    "de": _words(
        "der die das und ist sind was wie wer wann wo warum welche kann für mit nicht ein eine von zu im den dem ich auf wird wurde hat"
    ),
    "es": _words("el la los las es son qué que cómo como quién cuándo dónde por para con una un del en se de cuál cuánto fue está puede"),
    "fr": _words(
        "le la les est sont que quoi comment qui quand où pourquoi quel quelle pour avec une un des du dans se de et il elle peut a"
    ),
    "it": _words("il lo la gli le è sono che cosa come chi quando dove perché quale per con una un del della nel si di e può ha"),
    "pt": _words("o a os as é são que como quem quando onde por para com uma um do da no na se de e pode foi qual"),
}
