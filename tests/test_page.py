"The page of `t2i app` asked by programs, without a browser."
from importlib.util import find_spec

import pytest

if find_spec("gradio") is None:
    pytest.skip("gradio is not here: pip install 't2i[app]'", allow_module_level=True)


@pytest.fixture(scope="module")
def url():
    from t2i.page import open_page
    _, url, close = open_page(first="digits-var", port=0, device="cpu")
    yield url
    close()


def draw(client, prompt):
    "The line about one drawn image"
    settings = ["", 2, 1, 1, 0, "3"]  # to avoid, guidance, temperature, images, rerank, seed
    return client.predict("digits-var", prompt, *settings, api_name="/draw")[-1]


def test_two_programs_have_a_drawing_each(url):
    from gradio_client import Client
    first, second = [Client(url, verbose=False) for _ in range(2)]
    assert "draw an image first" in first.predict(api_name="/scales")[-1]
    assert "--seed 3" in draw(first, "a handwritten seven")
    assert "--seed 3" in draw(second, "a handwritten two")
    assert "a handwritten seven" in first.predict(api_name="/scales")[-1]
    assert "a handwritten two" in second.predict(api_name="/scales")[-1]


def test_the_best_of_several_candidates(url):
    from gradio_client import Client
    client = Client(url, verbose=False)
    settings = ["", 2, 1, 2, 3, "3"]
    gallery, _, line = client.predict("shapes-lora", "a red circle", *settings, api_name="/draw")
    assert len(gallery) == 2 and "--rerank 3" in line and "--lora" not in line
    assert "Image 1 of 2" in client.predict(api_name="/scales")[-1]


def test_bad_values_are_answered_in_one_line(url):
    from gradio_client import Client
    client = Client(url, verbose=False)
    assert draw(client, "") == "the prompt is empty: write what to draw"
    assert "there is no box yet" in client.predict(
        "digits-var", "", "a seven", 1, "", api_name="/place")[-1]
