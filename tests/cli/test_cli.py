"""The command line, as a user calls it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm
from fastlm import _C, cli, models
from fastlm.cli import main, objectives, parser

TREE = Path(fastlm.__file__).parent.parent
DATA = Path(__file__).parent.parent / "data"
TEXT = "".join(f"{i} green bottles hanging on the wall, and if one should fall there are {i - 1}.\n" for i in range(300, 0, -1))
SMALL = "--layers 2 --heads 2 --width 32 --context 32 --batch 4 --warmup 5 --eval-every 20 --save-every 1000".split()


def command(*arguments: str, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(TREE), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "fastlm", *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "bottles.txt"
    path.write_text(TEXT)
    return path


def test_help_of_every_command(capsys):
    names = ["demo", "info", "train", "generate", "chat", "eval", "bench", "plan", "verify", "convert"]
    for name in names:
        with pytest.raises(SystemExit) as ended:
            parser().parse_args([name, "--help"])
        assert ended.value.code == 0
        assert "--threads" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_info_names_machine_and_kernels(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"ISA        {_C.isa()}" in out
    assert "GPU        none" in out or "GPU        an" in out
    for op in ("matmul", "attention", "layer_norm"):
        assert any(line.split() == [op, f"cpu/{_C.isa()}"] for line in out.splitlines()), op
    assert "roof" not in out


def test_help_says_every_default(capsys):
    """0 too, which is a default like any other."""
    with pytest.raises(SystemExit):
        parser().parse_args(["generate", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for option, default in (("--top-k", "0"), ("--min-p", "0.0"), ("--seed", "0"), ("--beams", "1"), ("--temperature", "0.8")):
        assert f"(default: {default})" in out.split(f" {option} ")[-1].split(" --")[0], option


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "no/such/model", "x"],
        ["eval", "no/such/model", "no/such/text"],
        ["train", "no/such/text"],
        ["train"],
        ["train", "--resume", "--out", "no/such/run"],
        ["convert", "no/such/model", "no/such/target"],
        ["bench", "no_such_operation"],
    ],
)
def test_errors_are_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTLM_DEBUG", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastlm: ")
    assert captured.err.count("\n") == 1
    assert "[Errno" not in captured.err
    monkeypatch.setenv("FASTLM_DEBUG", "1")
    with pytest.raises((ValueError, OSError)):
        main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "x", "--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["train", "x", "--layers", "many"], "argument --layers: must be a whole number, got 'many'"),
        (["train", "x", "--seed", "-1"], "argument --seed: must be at least 0, got -1"),
        (["generate", "x", "y", "--seed", str(1 << 63)], "argument --seed: must be below 2^63, got 9223372036854775808"),
        (["plan", "gpt2", "--memory", "1" + "0" * 400], "argument --memory: must be below 2^63, got 1000"),
        (["nosuch"], "invalid choice: 'nosuch'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("setting", [{"FASTLM_ISA": "sse9"}, {"FASTLM_NUM_THREADS": "many"}])
def test_bad_settings_are_one_line(setting):
    """They are found out when fastlm._C is imported."""
    info = command("info", env={**setting, "FASTLM_DEBUG": ""})
    printed, errors = info.communicate(timeout=120)
    assert (info.returncode, printed) == (2, "")
    assert errors.startswith(f"fastlm: {next(iter(setting))} must be")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("kind", [["--tokenizer", "char"], ["--tokenizer", "bpe", "--vocab-size", "300", "--model", "llama"]])
def test_train_generate_eval(text, tmp_path, capsys, kind):
    out = tmp_path / "run"
    assert main(["train", str(text), "--out", str(out), "--steps", "60", "--lr", "1e-2", *SMALL, *kind]) == 0
    printed = capsys.readouterr().out
    assert "held-out   loss" in printed
    assert "by frequency" in printed
    assert "step 60/60" in printed
    assert (out / "loss.png").stat().st_size > 5000
    held = [json.loads(line).get("validation_loss") for line in (out / "log.jsonl").read_text().splitlines()]
    guess = float(printed.split("guessing blindly, ")[1].split()[0])
    assert held[-1] < guess - 0.3, "the model must beat guessing by frequency"

    assert main(["generate", str(out / "model"), "3", "--max-tokens", "20", "--temperature", "0"]) == 0
    once = capsys.readouterr().out
    assert main(["generate", str(out / "model"), "3", "--max-tokens", "20", "--beams", "1", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == once
    assert len(once) > 5

    assert main(["eval", str(out / "model"), str(text), "--max-tokens", "500"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["train", str(text), "--out", str(out)]) == 2  # the run that is there is not overwritten
    assert "--resume" in capsys.readouterr().err
    same = ["train", str(text), "--out", str(out), "--resume", "--steps", "60"]
    assert main([*same, "--layers", "3"]) == 2
    assert "layers was 2, is 3: leave that out" in capsys.readouterr().err
    assert main(same) == 0  # what is the run's may be said again


@pytest.mark.parametrize("objective", [name for name in objectives.MODELS if name != "causal"])
def test_train_by_other_objectives(tmp_path, capsys, objective):
    """Each learns, says so beside its baseline, saves a folder that loads, and goes on; the longer run is that of one piece."""
    text = tmp_path / "speeches.txt"
    text.write_text("".join(f"Speaker {i % 7}:\nI have {i} things to say,\nand not {i + 1}.\n\n" for i in range(400)))
    options = (
        "--tokenizer bpe --vocab-size 290 --layers 1 --heads 2 --width 32 --context 32 --batch 16 --warmup 10 --lr 5e-3".split()
    )
    out = tmp_path / "run"
    assert main(["train", str(text), "--out", str(out), "--steps", "150", "--objective", objective, *options]) == 0
    printed = capsys.readouterr().out
    guess, held = (float(printed.split(mark)[1].split()[0].rstrip(",)")) for mark in ("guessing blindly, ", "held-out   loss "))
    assert held < guess - 0.1, (held, guess)
    blind = float(printed.split("to beat    loss ")[1].split()[0])
    first = float(printed.split("step   1/150  loss ")[1].split()[0])
    assert first == pytest.approx(blind, rel=0.05 if objective != "spans" else 0.2), "first weights know nothing"
    assert f"{objectives.MODELS[objective][0]}, {objective}, " in printed
    lm = fastlm.load(out / "model")
    assert lm.tokenizer is not None
    assert main(["train", "--out", str(out), "--resume"]) == 0  # nothing is left to do: the same held-out loss
    assert f"held-out   loss {held:.4f}" in capsys.readouterr().out


QUICK = "--steps 2 --layers 1 --heads 2 --width 16 --context 32 --batch 2 --warmup 1 --eval-every 1".split()
PARAGRAPHS = "".join(f"Bottle {i} is green.\nIt is on the wall.\n\n" for i in range(60))


@pytest.mark.parametrize("objective", list(objectives.MODELS))
def test_held_out_text_too_short_for_a_row(tmp_path, capsys, objective):
    """Nothing is evaluated then; a last part without a blank line is one document, too few for pairs of them."""
    (tmp_path / "text").write_text(PARAGRAPHS + "Now it is quiet.\n" * 6)
    options = [str(tmp_path / "text"), "--out", str(tmp_path / "run"), *QUICK, "--held-out"]
    assert main(["train", *options, "0.03" if objective == "next-sentence" else "0.005", "--objective", objective]) == 0
    assert "held-out   loss" not in capsys.readouterr().out


def test_training_that_fails_says_so(text, tmp_path, capsys):
    """It ended in "logits row 0 has nan", or in a perplexity that was no number at all, and a run's folder had 'no config.json'."""
    out = tmp_path / "run"
    with pytest.warns(RuntimeWarning, match="skipped: loss nan"):
        assert main(["train", str(text), "--out", str(out), *QUICK, "--steps", "6", "--lr", "1e20"]) == 2
    found = capsys.readouterr()
    assert "perplexity nan" in found.out
    assert "the loss is not finite: this model is of no use. Train one with an --lr below 1e+20, in another --out\n" in found.err
    assert main(["generate", str(out), "3"]) == 2
    assert f"{out} has no config.json, its folder 'model' has: give {out / 'model'}" in capsys.readouterr().err
    assert main(["train", str(text), "--out", str(text)]) == 2
    assert f"--out must be a folder, got the file {text}" in capsys.readouterr().err
    assert main(["train", str(text), "--out", str(tmp_path / "other"), "--dtype", "bfloat16"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "--dtype must be float32 on the CPU, got bfloat16" in found.err
    assert not (tmp_path / "other").exists()


def test_generation_from_a_source_does_not_begin_with_it(tmp_path, capsys):
    (tmp_path / "text").write_text(PARAGRAPHS)
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "text"), "--out", str(out), *QUICK, "--objective", "spans"]) == 0
    lm = fastlm.load(out / "model")
    capsys.readouterr()
    for options in ([], ["--beams", "2"]):
        wanted = lm.generate("green", max_tokens=6, **({"beams": 2} if options else {}))
        extra = options or ["--temperature", "0"]
        assert main(["generate", str(out / "model"), "green", "--max-tokens", "6", *extra]) == 0
        assert capsys.readouterr().out == wanted + "\n"


def test_train_with_a_context_of_one(text, tmp_path, capsys):
    """There is no room for a prompt and what follows, so nothing is written."""
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *QUICK, "--context", "1"]) == 0
    assert f"model      {tmp_path / 'run' / 'model'}" in capsys.readouterr().out


def test_refused_options_leave_no_run(text, tmp_path, capsys):
    """The same command, put right, begins the run."""
    out = tmp_path / "run"
    begin = ["train", str(text), "--out", str(out), "--steps", "2", *SMALL]
    assert main([*begin, "--lr", "-1"]) == 2
    assert "lr must be greater than 0" in capsys.readouterr().err
    for option, value, message in (
        ("--lr", "nan", "--lr must be greater than 0"),
        ("--lr", "inf", r"--lr must be from 0\.0 to 3\.4"),
        ("--warmup", "-1", "--warmup must be an integer of at least 0, got -1"),
        ("--clip", "nan", r"--clip must be from 0\.0 to inf, got nan"),
        ("--weight-decay", "-1", r"--weight-decay must be from 0\.0"),
        ("--held-out", "1", r"--held-out must be from 0 to below 1, got 1\.0"),
    ):
        assert main([*begin, option, value]) == 2
        found = capsys.readouterr()
        assert found.out == "", "nothing is said of a run that cannot be"
        assert re.search(message, found.err)
        assert not out.exists()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(begin) == 0


def test_batch_that_the_text_does_not_fill(text, tmp_path, capsys):
    """It was put together of the same rows, for minutes, before anything was said."""
    assert main(["train", str(text), "--out", str(tmp_path / "run"), "--batch", str(10**9)]) == 2
    assert "--batch must be at most 20,594: the text has 20,594 tokens to train on, got 1,000,000,000" in capsys.readouterr().err
    text.write_text("A small text may fill the usual batch with the same rows.")
    small = ["--steps", "1", *SMALL, "--batch", "100"]
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *small]) == 0


def test_text_that_begins_with_blank_lines(tmp_path, capsys):
    """The prompt that is suggested at the end is the first word there is, wherever it stands."""
    text, out = tmp_path / "late.txt", tmp_path / "run"
    text.write_text("\n" * 200 + TEXT)
    assert main(["train", str(text), "--out", str(out), "--steps", "2", *SMALL]) == 0
    assert capsys.readouterr().out.endswith(f"Try: fastlm generate {out / 'model'} 300\n")


def test_objectives_and_models_that_do_not_fit(text, capsys):
    assert main(["train", str(text), "--objective", "masked", "--model", "gpt2"]) == 2
    assert "--model must be bert or albert for --objective masked, got gpt2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--copies", "3"], "--copies is for --objective masked, next-sentence, sentence-order, got causal"),
        (["--whole-word", "--objective", "spans"], "--whole-word is for --objective masked, .*, got spans"),
        (["--whole-word", "--objective", "replaced"], "--whole-word is for --objective masked, .*, got replaced"),
        (["--vocab-size", "300"], "--vocab-size is for --tokenizer bpe, got char"),
    ],
)
def test_options_without_effect_are_refused(text, capsys, options, message):
    assert main(["train", str(text), *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_interrupted_training_goes_on(text, tmp_path):
    """Ctrl-C saves and prints the command that goes on; the resumed run's losses are those of an uninterrupted one, bit for bit."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    settings = ["--steps", "400", *SMALL]
    reference = command("train", str(text), "--out", str(whole), *settings)
    interrupted = command("train", str(text), "--out", str(parted), *settings)
    printed = ""
    assert interrupted.stdout is not None
    while "20/400" not in printed:
        line = interrupted.stdout.readline()
        assert line, "it ended before it was interrupted"
        printed += line
    interrupted.send_signal(signal.SIGINT)
    rest, errors = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130, errors
    assert f"fastlm train --resume --out {parted}" in rest
    assert "saved in" in rest
    resumed = command("train", "--resume", "--out", str(parted))
    _, errors = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, errors
    _, errors = reference.communicate(timeout=240)
    assert reference.returncode == 0, errors

    def losses(folder: Path) -> list[tuple[int, float]]:
        return [(r["step"], r["loss"]) for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]

    assert losses(parted) == losses(whole)
    assert len(losses(whole)) == 400


def test_interrupted_import(monkeypatch, capsys):
    """Ctrl-C while a command's module is imported comes after it: NumPy's import makes an ImportError of it."""
    imported = []

    def module(name):
        os.kill(os.getpid(), signal.SIGINT)
        imported.append(name)

    monkeypatch.setattr("importlib.import_module", module)
    assert main(["info"]) == 130
    assert imported == ["fastlm.cli.info"]
    assert capsys.readouterr().err == "\nfastlm: stopped\n"


def test_convert_llama2c(tmp_path, capsys):
    """stories260K as a folder, and the first words that llama2.c prints for it."""
    source = DATA / "stories260k"
    target = tmp_path / "stories"
    assert main(["convert", str(source / "stories260K.bin"), str(target), "--tokenizer", str(source / "tok512.bin")]) == 0
    assert (target / "config.json").exists()
    capsys.readouterr()
    assert main(["generate", str(target), "", "--temperature", "0", "--max-tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time, there was a little girl named Lily.")
    assert main(["generate", str(target), "Once upon", "--temperature", "0", "--max-tokens", "20"]) == 0
    assert "[20 tokens, first after" in capsys.readouterr().err  # the text alone begins with a space, in a token of its own
    assert main(["convert", str(source / "stories260K.bin"), str(target)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["generate", str(source), ""]) == 2
    assert f"has no config.json: a model of llama2.c is made a folder by `fastlm convert {source}" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), ""]) == 2
    assert "has no config.json: expected a folder with config.json and *.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("kind", cli._KINDS)
def test_quantize(kind, tmp_path, capsys):
    """Every kind that the help names, without and with another option."""
    tokenizer = fastlm.Tokenizer.characters("abcdefgh")
    model = models.create(models.GPTConfig(tokenizer.vocab_size, context=64, d_model=32, n_layer=1, n_head=2))
    fastlm.LM(model, tokenizer).save(tmp_path / "model")
    command = ["generate", str(tmp_path / "model"), "abc", "--temperature", "0", "--max-tokens", "8", "--quantize", kind]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("abc")
    other = {"LOSSLESS": "float32"}.get(kind, "int8")
    assert main([*command, "--activations", other]) == 0
    assert capsys.readouterr().out.startswith("abc")


@pytest.fixture
def letters(tmp_path):
    """A folder with a model of eight letters."""
    tokenizer = fastlm.Tokenizer.characters("abcdefgh")
    model = models.create(models.GPTConfig(tokenizer.vocab_size, context=64, d_model=32, n_layer=1, n_head=2))
    fastlm.LM(model, tokenizer).save(tmp_path / "letters")
    return tmp_path / "letters"


def test_refused_generation_prints_nothing(letters, capsys):
    """What is wrong is found before the prompt is printed; what a beam search would not look at is refused."""
    wrong = {
        "top_k must be": ["--top-k", "-1"],
        "characters that are not in the vocabulary": ["--stop", "xyz"],
        "--temperature, --top-k must be left out with --beams 2": ["--beams", "2", "--temperature", "0.5", "--top-k", "5"],
    }
    for message, options in wrong.items():
        prompt = "30" if "--stop" in options else "abc"
        assert main(["generate", str(letters), prompt, *options]) == 2
        printed = capsys.readouterr()
        assert (message in printed.err, printed.out) == (True, "")
    assert main(["generate", str(letters), "abc", "--beams", "2", "--max-tokens", "4"]) == 0
    assert re.fullmatch("abc[a-h]{4}\n", capsys.readouterr().out)
    assert main(["generate", str(letters), "abc", "--max-tokens", "4"]) == 0
    assert re.fullmatch("abc[a-h]{4}\n", capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [["generate", "-"], ["chat"]])
def test_closed_standard_input(arguments, letters, capsys, monkeypatch):
    lm = fastlm.load(letters)
    lm.tokenizer.chat_template = "a"
    lm.save(letters)
    monkeypatch.setattr(sys, "stdin", None)
    assert main([arguments[0], str(letters), *arguments[1:]]) == 2
    assert capsys.readouterr().err == "fastlm: standard input is closed: there is nothing to read\n"


def test_closed_standard_output(text, tmp_path):
    """Training goes on without one."""
    run = ["train", str(text), "--out", str(tmp_path / "run"), "--steps", "2", *SMALL]
    closed = command(*run, preexec_fn=lambda: os.close(1))
    assert "Traceback" not in closed.communicate(timeout=120)[1]
    assert closed.returncode == 0
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_chat(tmp_path, capsys, monkeypatch):
    """One-shot and interactive; a talk longer than the context forgets its beginning."""
    letters = "".join(chr(c) for c in range(32, 127)) + "\n"
    tokenizer = fastlm.Tokenizer.characters(letters)
    model = models.create(models.GPTConfig(tokenizer.vocab_size, context=64, d_model=32, n_layer=1, n_head=2))
    fastlm.LM(model, tokenizer).save(tmp_path / "plain")
    assert main(["chat", str(tmp_path / "plain"), "--message", "Hello"]) == 2
    assert "chat template" in capsys.readouterr().err
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fastlm.LM(model, tokenizer).save(tmp_path / "talking")
    arguments = ["chat", str(tmp_path / "talking"), "--max-tokens", "8", "--temperature", "0", "--system", "Be brief."]
    assert main([*arguments, "--message", "Hello"]) == 0
    once = capsys.readouterr().out
    assert len(once) > 1
    lines = iter(["Hello", "Once more", "And again", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert once in out
    assert next(lines, None) is None


def test_demo_without_network_ends_well(tmp_path):
    """The second half says that it is left out; nothing fails."""
    env = {"FASTLM_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    demo = command("demo", "--steps", "4", "--out", str(tmp_path / "demo"), cwd=tmp_path, env=env)
    printed, errors = demo.communicate(timeout=240)
    assert demo.returncode == 0, errors
    assert "held-out   loss" in printed
    assert "could not be fetched" in printed
    assert "what to do next" in printed
    assert "Traceback" not in printed + errors
