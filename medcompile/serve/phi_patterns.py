"""What identifies a person in clinical text, as patterns: the labels, titles and shapes that notes write it in.

They stand beside presidio's own recognizers (dates, e-mail and IP addresses, telephone and social security numbers,
credit cards ...), and find what has a sign beside it. A name without any sign ("Jordan improved overnight")
is found by a language model alone, or by a list of names: see scrub.py. Regular expressions are of the module regex.
"""

from __future__ import annotations

from collections.abc import Mapping

PERSON, DATE, PLACE, NUMBER, AGE, LINK, PHONE = "PERSON", "DATE", "LOCATION", "ID", "AGE", "URL", "PHONE"

_WORD = r"\p{Lu}[\p{L}'’-]*\p{L}"
_INITIAL = r"\p{Lu}\.?(?![\p{L}])"
_NAME = rf"{_WORD}(?:[ \t]+(?:{_INITIAL}|(?:van|von|de|der|den|del|la|bin|al|da|di|dos)\b|{_WORD})){{0,3}}"
_FULL_NAME = rf"{_WORD}(?:[ \t]+{_INITIAL})?[ \t]+{_WORD}(?:[ \t]+{_WORD})?"
_LAST_FIRST = rf"{_WORD},[ \t]*{_WORD}(?:[ \t]+{_INITIAL})?"

_LABELS = (
    r"(?:patient(?:'s)?(?:[ ]name)?|pt|name|full[ ]name|first[ ]name|last[ ]name|given[ ]name|surname|maiden[ ]name|"
    r"mother|father|parent|guardian|daughter|son|wife|husband|spouse|partner|brother|sister|next[ ]of[ ]kin|nok|"
    r"emergency[ ]contact|contact|attending|resident|referring|referred[ ]by|requested[ ]by|ordered[ ]by|seen[ ]by|"
    r"reviewed[ ]by|signed(?:[ ]by)?|electronically[ ]signed[ ]by|dictated[ ]by|transcribed[ ]by|physician|surgeon|"
    r"provider|consultant|gp|pcp|radiologist|re)"
)
_NOT_NAMES = (
    r"(?:Health|Care|Safety|Education|Information|History|Reported|Reports|Denies|Denied|States|Presents|Presented|Has|"
    r"Was|Is|Will|Had|Needs|Underwent|Admitted|Discharged|Instructions|Controlled|Activity|Status|Summary|Name|Portal|The|"
    r"This|Unknown|None|Not|No|Yes)\b"
)
_ACRONYM = r"\p{Lu}{2,5}\b(?!,)"  # "PT: INR 2.5" names no patient
_GIVEN = (
    "James|Robert|John|Michael|David|William|Richard|Joseph|Thomas|Christopher|Charles|Daniel|Matthew|Anthony|Steven|"
    "Paul|Andrew|Joshua|Kenneth|Kevin|Brian|George|Timothy|Ronald|Jason|Edward|Jeffrey|Ryan|Jacob|Gary|Nicholas|Eric|"
    "Jonathan|Stephen|Larry|Justin|Scott|Brandon|Benjamin|Samuel|Gregory|Alexander|Patrick|Frank|Raymond|Jack|Dennis|"
    "Jerry|Tyler|Aaron|Jose|Adam|Nathan|Henry|Peter|Zachary|Kyle|Walter|Harold|Jeremy|Ethan|Carl|Keith|Roger|Gerald|"
    "Arthur|Lawrence|Albert|Juan|Carlos|Luis|Ahmed|Ali|Mohammed|Muhammad|Omar|Ivan|Hans|Pierre|Raj|Wei|Hiroshi|"
    "Mary|Patricia|Jennifer|Linda|Elizabeth|Barbara|Susan|Jessica|Sarah|Karen|Lisa|Nancy|Betty|Margaret|Sandra|Ashley|"
    "Kimberly|Emily|Donna|Michelle|Carol|Amanda|Dorothy|Melissa|Deborah|Stephanie|Rebecca|Sharon|Laura|Cynthia|Kathleen|"
    "Amy|Angela|Shirley|Anna|Ann|Anne|Brenda|Pamela|Emma|Nicole|Helen|Samantha|Katherine|Catherine|Christine|Debra|"
    "Rachel|Carolyn|Janet|Maria|Heather|Diane|Ruth|Julie|Olivia|Joyce|Virginia|Victoria|Kelly|Lauren|Christina|Joan|"
    "Evelyn|Judith|Megan|Andrea|Cheryl|Hannah|Jacqueline|Martha|Gloria|Teresa|Sara|Janice|Jean|Alice|Julia|Judy|Sophia|"
    "Denise|Doris|Rose|Marie|Fatima|Aisha|Mei|Yuki|Priya|Ana|Carmen|Ingrid|Olga|Natasha|Elena"
)

_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December|"
    r"Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.?"
)
_DAY = r"(?:0?[1-9]|[12][0-9]|3[01])(?:st|nd|rd|th)?"

_STREET = (
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Terrace|Way|Parkway|Pkwy|"
    r"Highway|Hwy|Circle|Square|Close|Crescent)"
)
_STATE = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|S[CD]|T[NX]|UT|V[AT]|"
    r"W[AIVY])"
)
_NUMBER_LABELS = (
    r"(?:MRN|medical[ ]record(?:[ ](?:number|no\.?|num\.?))?|hospital[ ](?:number|no\.?)|record[ ](?:number|no\.?)|"
    r"(?:patient|case|visit|encounter|accession|specimen|account|acct|policy|member|subscriber|group|claim|insurance|"
    r"health[ ]plan|beneficiary|license|licence|certificate|serial|device|passport|NHS|SSN|DEA|NPI|VIN|chart|study)"
    r"(?:[ ]?(?:ID|number|no\.?|num\.?|\#))|MRN|SSN|NHS|DEA|NPI|VIN|CSN|FIN)"
)

EXACT: Mapping[str, tuple[str, ...]] = {
    PERSON: (
        rf"(?<=\b(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Professor|Doctor|Nurse|Sister|Sir|Dame)\b\.?[ \t]+){_NAME}",
        rf"(?<=(?i:\b{_LABELS})[ \t]*[:=][ \t]*)(?!{_NOT_NAMES}|{_ACRONYM})(?:{_LAST_FIRST}|{_NAME})",
        rf"(?<=(?i:\b(?:patient|pt\.?|named|called))[ \t]+)(?!{_NOT_NAMES})(?!{_WORD}[ \t]+{_NOT_NAMES}){_FULL_NAME}",
        rf"\b{_FULL_NAME}(?=,?[ \t]*(?:\((?i:age|aged|dob|mrn)|,[ \t]*(?:an?[ \t]+)?\d{{1,3}}\b(?![./%])|"
        rf"[ \t]+is[ \t]+an?[ \t]+\d{{1,3}}|,[ \t]*(?:MD|M\.D\.|DO|RN|NP|PA-?C?|PhD|FRCP|MBBS)\b))",
        rf"(?<=\b(?:Dear|Sincerely,|regards,|Regards,)\s+){_NAME}",
        rf"\b(?:{_GIVEN})(?:[ \t]+{_INITIAL})?[ \t]+(?!{_NOT_NAMES}){_WORD}",
    ),
    DATE: (
        rf"(?i)\b{_MONTH}[ \t]+{_DAY}\b(?:,?[ \t]+\d{{4}}\b)?",
        rf"(?i)\b{_DAY}[ \t]+(?:of[ \t]+)?{_MONTH}(?:,?[ \t]+\d{{4}}\b)?(?![\p{{L}}])",
        rf"(?i)\b{_MONTH}[ \t]+(?:of[ \t]+)?(?:19|20)\d{{2}}\b",
        r"(?i)(?<=\b(?:dob|d\.o\.b\.|date of birth|born(?:[ ]on)?)[ \t]*:?[ \t]*)\d[\d./ -]{3,9}\d",
        r"\b(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:[0-2]\d[0-5]\d[0-5]\d)?\b",
    ),
    AGE: (
        r"(?i)(?<![\d.])(?:9\d|1[01]\d)(?=[ -]*(?:years?|yrs?|y)[ -]*(?:old|/?o\b)|[ ]?y/?o\b|[ ]?yo\b)",
        r"(?i)(?<=\b(?:aged?|age:)[ \t]*)(?:9\d|1[01]\d)\b(?![./%])",
    ),
    PLACE: (
        rf"\b\d{{1,5}}[A-Z]?[ \t]+(?:[NSEW]\.?[ \t]+)?(?:{_WORD}[ \t]+){{1,3}}{_STREET}\b\.?"
        rf"(?:,?[ \t]*(?i:apt|apartment|suite|unit|\#)\.?[ \t]*[\w-]+)?",
        rf"\b{_WORD}(?:[ \t]+{_WORD}){{0,2}},[ \t]*{_STATE}[ \t]+\d{{5}}(?:-\d{{4}})?\b",
        rf"(?<=\b(?:in|from|near|of|to|at)[ \t]+){_WORD}(?:[ \t]+{_WORD}){{0,2}},[ \t]*{_STATE}\b",
        r"(?i)(?<=\b(?:zip(?:[ ]?code)?|postcode|postal code)[ \t]*:?[ \t]*)[A-Z0-9][A-Z0-9 -]{3,8}[A-Z0-9]\b",
        r"\b[A-Z]{1,2}\d[A-Z\d]?[ ]\d[A-Z]{2}\b",
        r"(?i)\bP\.?[ ]?O\.?[ ]Box[ \t]+\d+",
        rf"\b(?:{_WORD}[ \t]+){{1,3}}(?:Hospital|Medical[ ]Center|Medical[ ]Centre|Clinic|Infirmary|Nursing[ ]Home)\b",
    ),
    NUMBER: (
        rf"(?i)(?<=\b{_NUMBER_LABELS}[ \t]*(?:is|was)?[ \t]*[:=\#]?[ \t]*)(?=[A-Z-]*\d)[A-Z0-9][A-Z0-9/-]{{3,24}}",
        r"\b[A-HJ-NPR-Z0-9]{3}(?=[A-HJ-NPR-Z0-9]*\d)(?=[A-HJ-NPR-Z0-9]*[A-Z])[A-HJ-NPR-Z0-9]{14}\b",
    ),
    PHONE: (r"(?<![\d.-])(?:\+?1[ .-]?)?(?:\(\d{3}\)[ ]?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\d-])",),
    LINK: (r"(?i)\b(?:https?://|ftp://|www\.)[^\s<>\"'\])]+",),
}
"""Kind -> patterns, each of what is to be replaced and no more."""
