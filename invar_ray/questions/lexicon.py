"""Word lists of the rule-based rewriter.

Small on purpose: a word that is a noun as often as a verb is left out, a wrong parse costs more
than a missed one.
"""

from __future__ import annotations

BE = frozenset({"is", "are", "was", "were"})
DO = frozenset({"do", "does", "did"})
HAVE = frozenset({"has", "have", "had"})
MODAL = frozenset({"can", "could", "will", "would", "should", "must", "may", "might"})
AUXILIARIES = BE | DO | HAVE | MODAL
WH = frozenset({"what", "which", "who", "whom", "whose", "where", "when", "why", "how"})
DETERMINERS = frozenset(
    "the a an this that these those his her its their my your our some any each every no another".split()
)
PREPOSITIONS = frozenset(
    """of in on at by for from to with within without into onto over under between among against about after before
    during since until through throughout across along around near behind beyond above below per as than via toward
    towards upon off out up down like inside outside""".split()
)
PRONOUNS = frozenset("i you he she it we they there".split())
# Words that may lose a capital at the start of a question, because they are no names.
FUNCTION_WORDS = (
    AUXILIARIES
    | WH
    | DETERMINERS
    | PREPOSITIONS
    | PRONOUNS
    | frozenset(
        """and or but if while because although according besides along despite unlike name tell approximately about
    how many much other say give count list find identify state show explain any who's what's
    one two three four five six seven eight nine ten all both most when""".split()
    )
)
IMPERATIVES = frozenset("tell name say give count list find identify state show explain".split())
# Left out in telegraphic questions; words that carry a meaning of their own (not, before, between)
# stay.
STOP_WORDS = (
    BE | DO | HAVE | frozenset("the a an of to that it there this these those for by with".split())
)

_IRREGULAR = """
arise arose arisen|become became become|begin began begun|bear bore born|break broke broken|bring brought brought
build built built|buy bought bought|catch caught caught|choose chose chosen|come came come|die died died|draw drew drawn
drive drove driven|eat ate eaten|fall fell fallen|feel felt felt|fight fought fought|find found found|flee fled fled
fly flew flown|forbid forbade forbidden|forget forgot forgotten|get got got|give gave given|go went gone
grow grew grown|hear heard heard|hold held held|keep kept kept|know knew known|lead led led|leave left left|lie lay lain
lose lost lost|make made made|mean meant meant|meet met met|pay paid paid|say said said|see saw seen|sell sold sold
send sent sent|sing sang sung|sink sank sunk|sit sat sat|speak spoke spoken|spend spent spent
steal stole stolen|swear swore sworn|swim swam swum|take took taken|teach taught taught|tell told told
think thought thought|throw threw thrown|understand understood understood|wear wore worn|win won won
write wrote written|seek sought sought|lend lent lent|withdraw withdrew withdrawn|overthrow overthrew overthrown
undergo underwent undergone|arrive arrived arrived|have had had|do did done|shoot shot shot|hide hid hidden
"""
_REGULAR = """
accept accuse achieve acquire adopt advocate affect agree allow announce appear appoint argue arrest assassinate attend
award ban base belong believe blame borrow bury call carry cause cease celebrate circulate claim collapse collect
compete complete compose conclude confirm conquer consider consist contain continue contribute convert create criticize
cross crown decide declare decline define defeat defend demand deny depict derive describe destroy determine develop
differ direct disappear discover discuss divide dominate earn elect emerge emigrate employ enable encourage
enter enroll establish evolve exist expand experience explain explore express extend fail feature finish follow
force form found gain generate govern graduate happen help host identify implement improve include increase
inspire introduce invade invent invest involve issue join kill launch learn live locate look lose maintain marry
migrate move name need obtain occupy occur offer open operate oppose organize originate own perform persuade
possess predict prefer prevent produce prohibit promote propose prove provide publish reach receive recognize
recommend refer refuse reign reject relate release remain remove replace represent require resign return reveal
rule seem separate serve settle share sign star start stop study succeed suffer suggest support
surrender survive threaten tolerate transform travel treat turn use utilize visit vote want warn wish worship yield
""".split()
# Not "found", "bear", "lie": as tokens they are more often another verb's form or a noun.
_REGULAR_BASES = [
    base
    for base in _REGULAR
    if base not in {"found", "lose", "force", "star", "feature", "form", "issue"}
]

PAST: dict[str, str] = {}
PARTICIPLE: dict[str, str] = {}


def _regular_past(base: str) -> str:
    if base.endswith("e"):
        return base + "d"
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ied"
    if base in {"ban", "occur", "prefer", "refer", "stop", "enroll"}:
        return base + ("ed" if base == "enroll" else base[-1] + "ed")
    return base + "ed"


for _entry in _IRREGULAR.replace("\n", "|").split("|"):
    if _entry.strip():
        _base, _past, _participle = _entry.split()
        PAST[_base], PARTICIPLE[_base] = _past, _participle
for _base in _REGULAR_BASES:
    PAST.setdefault(_base, _regular_past(_base))
    PARTICIPLE.setdefault(_base, PAST[_base])

PARTICIPLES = frozenset(PARTICIPLE.values()) | frozenset(
    """located supposed known called named born filmed built held founded published recorded written used
    played signed assassinated married buried taken ratified abolished constructed completed formed cast shown
    set hit cut spread put aired broadcast elected""".split()
)
PARTICIPLES -= {"left", "lay", "saw", "come", "become", "set", "hit", "cut", "put", "cast"}

# Who did it -> the noun for the one who did it, and the verb's participle.
AGENTS = {
    "wrote": ("author", "written"),
    "directed": ("director", "directed"),
    "invented": ("inventor", "invented"),
    "founded": ("founder", "founded"),
    "composed": ("composer", "composed"),
    "designed": ("designer", "designed"),
    "discovered": ("discoverer", "discovered"),
    "created": ("creator", "created"),
    "produced": ("producer", "produced"),
    "developed": ("developer", "developed"),
    "painted": ("painter", "painted"),
    "built": ("builder", "built"),
}
MEASURES = {
    "old": "age",
    "tall": "height",
    "high": "height",
    "long": "length",
    "big": "size",
    "large": "size",
    "deep": "depth",
    "heavy": "weight",
    "wide": "width",
}
HOMOPHONES = {
    "their": "there",
    "there": "their",
    "they're": "there",
    "your": "you're",
    "its": "it's",
    "to": "too",
    "too": "to",
    "which": "witch",
    "whether": "weather",
    "weather": "whether",
    "where": "wear",
    "wear": "where",
    "write": "right",
    "right": "write",
    "won": "one",
    "one": "won",
    "new": "knew",
    "know": "no",
    "no": "know",
    "by": "buy",
    "buy": "by",
    "for": "four",
    "sea": "see",
    "see": "sea",
    "war": "wore",
    "who's": "whose",
    "whose": "who's",
    "role": "roll",
    "rain": "reign",
    "reign": "rain",
    "principal": "principle",
    "principle": "principal",
    "capital": "capitol",
    "site": "sight",
    "than": "then",
    "then": "than",
    "made": "maid",
    "main": "mane",
    "plane": "plain",
    "plain": "plane",
    "peace": "piece",
    "piece": "peace",
    "steel": "steal",
    "our": "hour",
    "hour": "our",
    "son": "sun",
    "sun": "son",
    "week": "weak",
    "would": "wood",
    "caused": "cost",
    "affect": "effect",
    "effect": "affect",
    "accept": "except",
    "board": "bored",
    "course": "coarse",
    "aren't": "aunt",
    "been": "bin",
    "are": "our",
}
CONTRACTIONS = {
    ("what", "is"): "what's",
    ("who", "is"): "who's",
    ("where", "is"): "where's",
    ("when", "is"): "when's",
    ("how", "is"): "how's",
    ("what", "are"): "what're",
    ("who", "has"): "who's",
    ("did", "not"): "didn't",
    ("does", "not"): "doesn't",
    ("do", "not"): "don't",
    ("is", "not"): "isn't",
    ("was", "not"): "wasn't",
    ("has", "not"): "hasn't",
    ("will", "not"): "won't",
    ("going", "to"): "gonna",
    ("want", "to"): "wanna",
}
FILLERS = ("um", "uh", "er", "like", "you know", "well", "so", "okay so", "hmm")
# QWERTY neighbours of each small letter.
NEIGHBOURS = {
    "q": "wa", "w": "qes", "e": "wrd", "r": "etf", "t": "ryg", "y": "tuh", "u": "yij", "i": "uok", "o": "ipl",
    "p": "ol",
    "a": "qsz", "s": "awdx", "d": "sefc", "f": "drgv", "g": "fthb", "h": "gyjn", "j": "hukm", "k": "jil", "l": "kop",
    "z": "asx", "x": "zsdc", "c": "xdfv", "v": "cfgb", "b": "vghn", "n": "bhjm", "m": "njk",
}  # fmt: skip
