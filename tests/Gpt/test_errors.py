from Gpt.errors import nearest


def test_nearest_words():
    assert nearest("stpes", ["steps", "width"]) == "did you mean 'steps'?"
    assert nearest("qqq", ["steps", "width"]) == "known: steps, width"
