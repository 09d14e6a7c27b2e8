"""The texts that make_golden.py runs. All written for this project."""

_HARBOUR = (
    "The harbour master keeps a ledger of every boat that ties up for the night.",
    "On Monday there were eleven of them, and two had no lights.",
    "He writes the name, the length in metres and the hour of arrival in a careful hand.",
    "A fishing boat from the north side pays half, because her owner mends the ladders.",
    "When the wind turns to the east, the small boats are moved behind the stone wall.",
    "Nobody has asked him to count the gulls, yet there is a column for those as well.",
    "In the winter the page for a whole week can stay almost empty.",
    "His daughter wants to replace the book with a tablet, and he has promised to think about it.",
    "The tide tables on the door were printed in a town that no longer has a printer.",
    "Tourists take photographs of the blue crane, which has not moved since the spring of 1987.",
    "A cat sleeps on the warm engine cover of the pilot boat and is paid in fish heads.",
    "If a visitor asks where the best soup is sold, the answer depends on who is listening.",
)
_KITCHEN = (
    "Wash a kilo of ripe tomatoes, cut a cross in each and pour boiling water over them.",
    "After a minute the skins come off by themselves.",
    "Meanwhile, chop two onions and a stick of celery as finely as patience allows.",
    "Warm four spoons of olive oil in a wide pan, but do not let it smoke.",
    "The onions should turn soft and golden, which takes longer than most recipes admit.",
    "Add the tomatoes, a bay leaf, a little sugar and a good pinch of salt.",
    "Let everything bubble on a low flame for forty minutes and stir now and then.",
    "A crust of old cheese may be dropped in; it gives depth and is taken out at the end.",
    "Pass half of the sauce through a sieve and return it to the pan.",
    "It keeps for five days in the fridge, or for three months in the freezer.",
)
_MACHINES = (
    "A queue forms when work arrives faster than it can be served.",
    "The time that a request waits is often longer than the time that it is worked on.",
    "Adding a second server halves the load on each, yet the wait falls by much more than half.",
    "A scheduler that knows the deadlines can reorder the queue without losing any throughput.",
    "The price is fairness: someone with a loose deadline stands aside "
    "for someone with a tight one.",
    "Engineers measure the slowest one percent, since that is what their users remember.",
    "Memory is the other limit, because each open conversation holds on to its share.",
    "When it runs out, something has to be paused, moved or computed again.",
    "None of this is new; telephone exchanges faced the same sums a hundred years ago.",
)


def _join(*parts: tuple[str, ...]) -> str:
    return " ".join(sentence for part in parts for sentence in part)


def _chat(*turns: tuple[str, str]) -> str:
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


SMOLLM2 = (
    "The first thing I noticed",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "def mean(values: list[float]) -> float:\n    ",
    "Once upon a time, in a village under a glacier, there lived a clockmaker who",
    "Les élèves sont allés à la bibliothèque où ils ont trouvé un vieux livre sur",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Übersetzung ins Englische:",
    "Weather today: ☀️ 24°C 🌬️ 12 km/h. Weather tomorrow: 🌧️",
    "春は桜、夏は花火、秋は紅葉、冬は雪。日本の四季は",
    "Shopping list:\n- 2 litres of milk\n- 6 eggs\n- 500 g of flour\n- 1 lemon\n\n"
    "With these I can bake",
    '{"name": "Ada", "age": 36, "languages": ["en", "fr"], "address": {"city": "London", "zip":',
    "SELECT customers.name, SUM(orders.total) AS spent\nFROM customers\nJOIN orders ON "
    "orders.customer_id = customers.id\nWHERE orders.created_at >= '2023-01-01'\nGROUP BY",
    _chat(("user", "Which planet in our solar system has the most moons?")),
    _chat(
        ("system", "You are a patient teacher who answers in two short sentences."),
        ("user", "Why does ice float on water?"),
    ),
    _chat(
        ("user", "Give me three names for a small grey cat."),
        ("assistant", "Ash, Pebble and Smoke."),
        ("user", "Now three for a big orange one, please."),
    ),
    "import heapq\n\n\nclass Simulator:\n    def __init__(self):\n        self.now = 0.0\n"
    "        self.events = []\n\n    def push(self, delay, action):\n"
    "        heapq.heappush(self.events, (self.now + delay, id(action), action))\n\n"
    "    def run(self):\n        while self.events:\n            ",
    "Year,Rain (mm),Sun (h)\n2015,812.4,1650\n2016,790.1,1702\n2017,845.9,1588\n2018,601.3,1990\n"
    "2019,733.0,1811\n2020,698.7,1873\n2021,880.2,1540\n2022,575.5,2021\n2023,",
    _join(_KITCHEN[:5]) + "\n\nQuestion: what happens to the onions?\nAnswer:",
    _join(_MACHINES),
    _join(_HARBOUR),
    _chat(
        ("system", "You summarise texts."),
        ("user", "Summarise this in one sentence.\n\n" + _join(_HARBOUR[:8], _KITCHEN[:4])),
    ),
    _join(_KITCHEN, _MACHINES) + "\n\nThe two texts above have in common that",
    _chat(
        (
            "user",
            "Which of these sentences are about food?\n\n"
            + _join(_MACHINES, _KITCHEN, _HARBOUR[:4]),
        )
    ),
    _join(_HARBOUR, _KITCHEN, _MACHINES, _HARBOUR[3:7]) + " And at the end of the day,",
)

TOKENIZER = (
    "",
    " ",
    "Hello, world!",
    "  two leading spaces and a trailing one ",
    "tabs\tand\nnew\r\nlines\n\n\nthree",
    "year 2024, pi 3.14159, 1,000,000 and x2y3",
    "spaces before digits   42",
    "don't we'll they've I'm he'd it's",
    "DON'T SHOUT",
    "naïve café, Ångström, İstanbul, Straße",
    "cafe\u0301 with a combining accent",
    "Привет, как дела?",
    "Καλημέρα κόσμε",
    "שלום עולם",
    "日本語と中文と한국어",
    "🎉👩‍👩‍👧‍👦🇫🇷 flags and families",
    "def f(x):\n    return x ** 2  # squared\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b <|endoftext|>",
    "https://example.org/a-b_c?d=1&e=%20#f",
    "½ ² ① Ⅷ ٣",
    "\u00a0no-break\u2003em space\u200bzero width",
)

CONVERSATIONS = (
    [{"role": "user", "content": "Hello!"}],
    [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "What is 2 + 2?"},
    ],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another\none, s'il vous plaît 🎨"},
    ],
)
