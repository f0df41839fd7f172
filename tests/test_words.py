"""How texts are cleaned, and the texts of classes. Expected: what the authors' denoise_text gives (meta.py of CAPro,
with stop-words 2018.7.23, Python's re and every word in its dictionaries), unless a line says otherwise."""

import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mopro_fast.errors import UserError
from mopro_fast.text.words import class_texts, clean, image_text, read_class_texts, read_dictionary, wordnet_texts

CLEANED = [
    ("", ""),
    ("   ", ""),
    ("Tench", "tench"),
    ("A Tench (Tinca tinca) caught in the UK", "tench tinca tinca caught"),
    ("IMG_2041.JPG", ""),
    ("dsc00123.jpeg goldfish", "dsc goldfish"),
    ("golden_retriever.png", ""),
    ("x.jpgy.gifz", "xyz"),
    ("Fish &amp; Chips &lt;b&gt;bold&lt;/b&gt;", "fish chips bold"),
    ("<a href='http://x.com'>great white shark</a>", "great white shark"),
    ("See www.flickr.com/photos/1 for more sharks", "see sharks"),
    ("http://example.org/a?b=c hammerhead", "hammerhead"),
    ("https://t.co/abc and a stingray", "stingray"),
    ("mail me@home.de please", "mail please"),
    ("End.It was fun", "fun"),  # taken for a URL
    ("HTTPS HTTP://", ""),
    ("foo.com", ""),
    ("Ver. 2.0 of 3D printers", "ver printers"),
    ("r2d2 c3po bb8", "cpo"),
    ("ox ax cat", "cat"),
    ("the cat and the dog", "cat dog"),
    ("It's the dog's bowl, isn't it", "dog bowl isn"),
    ("don't won't can't", "don won can"),
    ("CAFÉ au lait crème brûlée", "café lait crème brûlée"),
    ("Straße ﬁsh ½ x² ²²²", "straße ﬁsh"),
    ("狗 和 小猫咪", "小猫咪"),
    ("собака на сене", "собака сене"),
    ("emoji 🐶 puppy 🐱", "emoji puppy"),
    ("snake_case and kebab-case", "kebab case"),
    ("a < b and c > d", ""),
    ("&quot;quoted&quot; &#39;words&#39; &nbsp;", "quoted words"),
    ("nul\0byte ok", "nul byte"),
    ("ÀÉ İstanbul", "stanbul"),
    ("mine fire bill system", "mine fire bill system"),
    ("\ud83dlone surrogate", "lone surrogate"),
    ("tab\tseparated\nlines", "tab separated lines"),  # theirs: tabseparatedlines
    ("one<br>two", "one two"),  # theirs: onetwo
    ("Cafe\u0301 Mu\u0308nchen", "caf\u00e9 m\u00fcnchen"),  # theirs: cafe nchen
]
NOUNS = """{0} 05 n 02 Big_Tench 0 tinca-tinca 0 003 @ {1} n 0000 ~ {2} n 0000 + {1} n 0101 | a Fish; "caught"; "2-fold"
{1} 05 n 01 fish 0 001 ~ {0} n 0000 | lives in water
{2} 05 n 01 small_tench(a) 0 002 @ {0} n 0000 ;c {0} n 0000 | a young tench
"""


@pytest.fixture
def wordnet(tmp_path):
    """-> a folder with three synsets, and their ids."""
    lines = NOUNS.splitlines(keepends=True)
    width = [len(line) + 5 * line.count("{") for line in lines]  # an offset has eight digits
    offsets = [f"{sum(width[:i]):08d}" for i in range(3)]
    (tmp_path / "data.noun").write_bytes(NOUNS.format(*offsets).encode())
    return str(tmp_path), [f"n{offset}" for offset in offsets]


@pytest.mark.parametrize(("text", "expected"), CLEANED, ids=range(len(CLEANED)))
def test_cleaning(text, expected):
    assert clean(text) == expected


def test_parts_are_cleaned_each():
    assert image_text(["a < b", "The Tench", "", "c > d", "koi"]) == "tench koi"


def test_dictionary(tmp_path):
    (tmp_path / "words").write_bytes("\ufeffParis\r\nfish\n".encode())
    words = read_dictionary(str(tmp_path / "words"))
    assert clean("A fish in PARIS, un poisson", words) == "fish paris"
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    (tmp_path / "none").write_bytes(b"\n")
    for name in ("bad", "none", "absent"):
        with pytest.raises(UserError, match=f"--dictionary .*{name}"):
            read_dictionary(str(tmp_path / name))


@pytest.mark.parametrize("piece", ["<", "a.", "http", "&", "a", ".com", "<a "])
def test_no_text_takes_the_square_of_its_length(piece):
    def seconds(count: int) -> float:
        began = time.thread_time()
        clean(piece * count)
        return time.thread_time() - began

    least = max(min(seconds(10_000) for _ in range(2)), 1e-3)
    assert seconds(80_000) < 30 * least  # the square is 64 times as much


def table(tmp_path, text, name="classes.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_class_texts(tmp_path):
    expected = ["Tench", "Gold_Fish"], ["tench", "gold fish a small fish"]
    rows = 'description,label,name\r\n"A small-fish",1,Gold_Fish\r\n,0,Tench\r\n'
    assert read_class_texts(table(tmp_path, "\ufeff" + rows), None, 2) == expected
    named = table(tmp_path, "name,label,other,description\nGold_Fish,n02,x,A small-fish\nTench,0,y,\n")
    assert read_class_texts(named, ["n01", "n02"], 2) == expected == class_texts(named, None, ["n01", "n02"], 2)
    for label in ([1, 0], ["1", "n01"]):
        columns = {"label": label, "name": ["Gold_Fish", "Tench"], "description": ["A small-fish", None]}
        pq.write_table(pa.table(columns), tmp_path / "classes.parquet")
        assert read_class_texts(str(tmp_path / "classes.parquet"), ["n01", "n02"], 2) == expected


def test_class_tables_that_contradict_the_data(tmp_path, capfd):
    swapped = table(tmp_path, "label,name\n0,House-Dog\n1,cat\n")
    message = r"row 1: the class 0 \(cat in the data\) is named 'House-Dog', which is the data's name of class 1"
    with pytest.raises(UserError, match=message):
        read_class_texts(swapped, ["cat", "house dog"], 2)
    cars = table(tmp_path, "label,name\njaguar,Panthera onca\njaguar_car,Jaguar\n")
    assert read_class_texts(cars, ["jaguar", "jaguar_car"], 2)[0] == ["Panthera onca", "Jaguar"]
    assert "row 2: the class 1 (jaguar_car in the data) is named 'Jaguar', which is" in capfd.readouterr().err
    own = table(tmp_path, "label,name\nCrane,Crane\ncrane,crane\n")
    assert read_class_texts(own, ["Crane", "crane"], 2)[0] == ["Crane", "crane"] and not capfd.readouterr().err
    right = table(tmp_path, "label,name\n0,Cat\n1,a dog\n2,bird\n9,fish\n")
    assert read_class_texts(right, ["cat", "house dog", "bird"], 2) == (["Cat", "a dog"], ["cat", "a dog"])
    assert "2 rows of classes that no image has, such as '2': not used" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("label,name\n0,a\n", "1 of 2 classes have no row, such as 1 (n02)"),
        ("label,name\n0,a\n1,b\nn01,c\n", "row 3: the class 'n01' is there twice"),
        ("label,name\n0,a\n2,b\n", "1 of 2 classes have no row"),  # a row of a class without images is passed over
        ("label,name\n0,a\n-1,b\n", "row 2: '-1' is no class"),
        ("label,name\n0,a\n" + "9" * 5000 + ",b\n", "row 2: '999"),
        ("label,name\n0,a\nn\u202e,b\n", r"row 2: 'n\u202e' is no class"),
        ("label,name\n0,a\n1, - \n", "row 2: the class '1' has no text"),
        ("label,description\n0,a\n", "no column name"),
        ("label;name\n0;a\n", "its columns are 'label;name'"),
        ("label,name\n0,a,b\n", "Expected 2 columns, got 3"),
        ("label,name,name\n0,a,b\n", "classes.csv"),
        (b"label,name\n0,\xe9\n", "row 1: "),
        ("label,name\n0,a\n1,b\n".encode("utf-16"), "UTF-16"),
        ("", "Empty"),
        (b"PAR1", "classes.csv"),
    ],
    ids=range(15),
)
def test_class_tables_that_are_refused(tmp_path, text, says):
    with pytest.raises(UserError) as caught:
        read_class_texts(table(tmp_path, text), ["n01", "n02"], 2)
    assert says in str(caught.value) and "classes.csv" in str(caught.value) and str(caught.value).isprintable()


def test_one_source_of_class_texts(wordnet):
    folder, synsets = wordnet
    with pytest.raises(UserError, match="one of --classes FILE and --wordnet DIR"):
        class_texts("a.csv", folder, synsets, 3)
    for names, why in ((synsets, "by synsets"), (None, "does not name"), (["a", "b"], "does not name")):
        with pytest.raises(UserError, match=why):
            class_texts(None, None, names, 3)
    assert class_texts(None, None, ["Grey_Owl", "b"], 2) == (["Grey_Owl", "b"], ["grey owl", "b"])
    for classes in (None, synsets[:2]):
        with pytest.raises(UserError, match="named by synsets"):
            class_texts(None, folder, classes, 3)
    with pytest.raises(UserError, match=r"no\.csv"):
        class_texts("no.csv", None, None, 3)


def test_wordnet(wordnet):
    folder, synsets = wordnet
    tench = "big tench tinca tinca a fish caught 2 fold"
    young = "small tench a young tench"
    fish = "fish lives in water"
    names, texts = class_texts(None, folder, synsets, 3)
    assert names == ["big tench", "fish", "small tench"]
    assert texts == [f"{tench} {fish} {young}", f"{fish} {tench}", f"{young} {tench} {tench}"]


def test_wordnet_that_is_refused(wordnet, tmp_path):
    folder, synsets = wordnet
    for synset in ("n00000001", "n99999999", "v00000000"):
        with pytest.raises(UserError, match=r"WordNet 3.0|data.verb"):
            wordnet_texts(folder, [synset])
    with pytest.raises(UserError, match="'tench' is no synset"):
        wordnet_texts(folder, ["tench"])
    with pytest.raises(UserError, match=r"data\.noun"):
        wordnet_texts(str(tmp_path / "none"), synsets)
