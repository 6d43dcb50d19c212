"Captions of many images: killed twice and resumed, the files are those of an undisturbed run"
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from t2i.control.captioning import (
    ABOUT,
    PARTIAL,
    TABLE,
    CaptionConfig,
    TemplateCaptioner,
    caption_folder,
    images_to_caption,
)
from t2i.core import T2IError, fold_in

IMAGES = 10_000
WORDS = "<pad> </s> <unk> <image> Question: Answer: what is this? a red blue circle star".split()


def tiny_blip2(folder):
    "A BLIP-2 of a few thousand random weights, with its processor"
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    sizes = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config=sizes | dict(intermediate_size=32, image_size=16, patch_size=8),
        qformer_config=sizes | dict(intermediate_size=32, encoder_hidden_size=16,
                                    vocab_size=len(WORDS)),
        text_config=sizes | dict(model_type="opt", ffn_dim=32, vocab_size=len(WORDS),
                                 word_embed_proj_dim=16, max_position_embeddings=64,
                                 pad_token_id=0, bos_token_id=1, eos_token_id=1),
        num_query_tokens=2, image_token_index=3)
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(folder)
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", bos_token="</s>",
        unk_token="<unk>")
    images = transformers.BlipImageProcessor(size=dict(height=16, width=16))
    transformers.Blip2Processor(images, tokenizer, num_query_tokens=2).save_pretrained(folder)


def write_images(folder):
    "Images of noise, in ten subfolders"
    for i in range(IMAGES):
        path = folder/f"part{i%10}"/f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 8, 3), generator=fold_in(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)


def start(folder, model, batch_size):
    "`t2i data caption` as a process of its own"
    words = ["data", "caption", folder, "-m", model, "--prompt", "Question: what is this? Answer:",
             "--max-tokens", 4, "--beams", 1, "--batch-size", batch_size]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen([sys.executable, "-m", "t2i", *map(str, words)], env=env, **quiet)


def kill_after(folder, model, count, batch_size):
    "Kill the process when it has written so many lines"
    process = start(folder, model, batch_size)
    lines = 0
    while lines < count:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(.2)
        if (folder/PARTIAL).exists():
            lines = (folder/PARTIAL).read_bytes().count(b"\n")
    process.send_signal(signal.SIGKILL)
    process.wait()
    return (folder/PARTIAL).read_bytes().count(b"\n")


@pytest.mark.slow  # four minutes of one core
def test_ten_thousand_images_killed_twice(tmp_path):
    tiny_blip2(tmp_path/"blip2")
    for name in ("whole", "killed"):
        write_images(tmp_path/name)
    assert start(tmp_path/"whole", tmp_path/"blip2", 64).wait() == 0
    first = kill_after(tmp_path/"killed", tmp_path/"blip2", 2_000, 64)
    second = kill_after(tmp_path/"killed", tmp_path/"blip2", 6_000, 48)
    assert 2_000 <= first < second < IMAGES
    assert start(tmp_path/"killed", tmp_path/"blip2", 80).wait() == 0
    for name in (TABLE, ABOUT):
        assert (tmp_path/"whole"/name).read_bytes() == (tmp_path/"killed"/name).read_bytes()
    about = json.loads((tmp_path/"whole"/ABOUT).read_text())
    rows = (tmp_path/"whole"/TABLE).read_text().splitlines()
    assert about["images"] == IMAGES == len(rows) + len(about["failed"])
    assert not (tmp_path/"killed"/PARTIAL).exists()


def test_what_cannot_be_captioned_is_named_before_a_model_is_loaded(tmp_path, caplog):
    for name in (b"a.png", b"caf\xe9.png"):
        Image.new("RGB", (8, 8)).save(os.path.join(os.fsencode(tmp_path), name))
    (tmp_path/"torn.png").write_bytes(b"no image")
    assert [p.name for p in images_to_caption(tmp_path)] == ["a.png"]
    unread, named = [r.getMessage() for r in caplog.records if r.getMessage()[:8] == "left out"]
    assert unread.endswith("that cannot be read: 'torn.png'")
    assert named.endswith("names that are not in UTF-8: 'caf\\udce9.png'")
    assert caption_folder(tmp_path, TemplateCaptioner(), CaptionConfig(prompt="x")).is_file()


def test_a_run_that_stopped_within_its_first_line_goes_on(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path/"a.png")
    for torn in ("", '{"model": "tem'):
        (tmp_path/PARTIAL).write_text(torn)
        table = caption_folder(tmp_path, TemplateCaptioner(), CaptionConfig(prompt="a dot"))
        assert json.loads(table.read_text()) == dict(file_name="a.png", text=["a dot"])
        table.unlink()


def test_an_image_without_a_class_is_named_before_any_is_captioned(tmp_path):
    (tmp_path/"cat").mkdir()
    for path in (tmp_path/"cat"/"a.png", tmp_path/"stray.png"):
        Image.new("RGB", (8, 8)).save(path)
    config = CaptionConfig(prompt="a photo of a {class}")
    with pytest.raises(T2IError, match="stray.png lies in no subfolder that names its class"):
        caption_folder(tmp_path, TemplateCaptioner(), config, batch_size=1)
    assert not (tmp_path/PARTIAL).exists()
