"""What is kept under a key is found under that key alone."""

from recall_merge.continual.keys import KeyedFile, key_of


def test_content_is_found_under_its_own_key(tmp_path):
    path = tmp_path / "made" / "scores.json"
    kept = KeyedFile(path, key_of({"seed": 0}))
    assert not kept.exists
    kept.content["scores"] = {"ü": 0.5}
    kept.write()
    again = KeyedFile(path, key_of({"seed": 0}))
    assert again.exists and again.content == {"scores": {"ü": 0.5}}
    other = KeyedFile(path, key_of({"seed": 1}))
    assert not other.exists and other.content == {}
    other.write()
    assert not KeyedFile(path, key_of({"seed": 0})).exists


def test_a_damaged_file_is_not_there(tmp_path):
    for text in ("{", "[]", "null", '{"scores": {}}'):
        (tmp_path / "k.json").write_text(text)
        kept = KeyedFile(tmp_path / "k.json", "k")
        assert not kept.exists and kept.content == {}


def test_the_order_of_facts_does_not_matter():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 2, "b": 1})
