"""The command `vqgan`. Thin: every subcommand parses, calls the library, and says what it did.

JAX is imported only once a command needs it, so that help and mistakes are answered at once.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro

from vqgan.errors import InputError

T = TypeVar("T")

_HELP = """usage: vqgan COMMAND [options]       (vqgan COMMAND --help says more)

  demo               both stages on the embedded emoji, then pictures and a report
  train-tokenizer    stage 1: train an image tokenizer, starting from a preset
  train-prior        stage 2: train a prior over a tokenizer's codes
  reconstruct        images through a tokenizer and back
  sample             new images
  convert            published weights into a model directory, or a model back to PyTorch
  doctor             devices, versions, memory, and what is missing
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit status 0, 1 for a run that failed, 2 for input that is wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP, end="")
        return
    name, *rest = argv
    if name not in _COMMANDS:
        _fail(f"no command {name!r}; there are {', '.join(_COMMANDS)}", 2)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    try:
        _COMMANDS[name](rest)
    except InputError as error:
        _fail(str(error), 2)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; give another place or make room", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, status: int) -> None:
    print(f"vqgan: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _start_jax() -> None:
    """Joins the other processes, if any, and turns on the cache of compiled programs."""
    import jax

    from vqgan.train.sharding import join_processes

    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(home / "vqgan" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    join_processes()


def _parse(kind: Callable[..., T], argv: Sequence[str], command: str, **options: Any) -> T:
    # Of a union of configs, the options are those of the default's class.
    config = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(kind, args=argv, prog=f"vqgan {command}", config=config, **options)


def _with_kinds(config: Any, argv: Sequence[str]) -> Any:
    """A preset with the kinds that are asked for, each at its own defaults.

    They are `--model.quantizer.kind`, within it `--model.quantizer.inner.kind`, and
    `--discriminator.kind`; a preset of stage 2 has none of them.
    """
    from vqgan.adversarial.discriminators import DiscriminatorConfig
    from vqgan.tokenizer.quantizers import QuantizerConfig, SingleConfig

    if not hasattr(config, "discriminator"):
        return config
    option = "--model.quantizer"
    quantizer = _of_kind(config.model.quantizer, QuantizerConfig, f"{option}.kind", argv)
    if hasattr(quantizer, "inner"):
        inner = _of_kind(quantizer.inner, SingleConfig, f"{option}.inner.kind", argv)
        quantizer = dataclasses.replace(quantizer, inner=inner)
    judge = _of_kind(config.discriminator, DiscriminatorConfig, "--discriminator.kind", argv)
    model = dataclasses.replace(config.model, quantizer=quantizer)
    return dataclasses.replace(config, model=model, discriminator=judge)


def _of_kind(config: Any, union: Any, option: str, argv: Sequence[str]) -> Any:
    """The member of a union of configs that an option names; `config` where it is of this kind."""
    words = [word for given in argv for word in given.split("=", 1)]
    if option not in words[:-1]:
        return config
    kind, kinds = words[words.index(option) + 1], {c.kind: c for c in get_args(union)}
    if kind not in kinds:
        raise InputError(f"{option} {kind}: there are {', '.join(kinds)}")
    return config if kind == config.kind else kinds[kind]()


def _training(command: str, argv: Sequence[str], presets: dict[str, Callable], extra: type) -> Any:
    """Parses `PRESET --data --out --steps --seed` and every field of the preset as an option."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: vqgan {command} PRESET --out DIR [options]\n\npresets:")
        width = max(map(len, presets))
        for name, preset in presets.items():
            print(f"  {name:{width}}  {(preset.__doc__ or '').partition(chr(10))[0]}")
        print(f"\n`vqgan {command} PRESET --help` lists the options with the preset's values.")
        sys.exit(0)
    name, *rest = argv
    if name not in presets:
        raise InputError(f"{command}: no preset {name!r}; there are {', '.join(presets)}")
    default = _with_kinds(presets[name](), rest)
    options = _parse(extra, rest, f"{command} {name}", default=extra(config=default))
    if options.out is None:
        raise InputError(f"{command}: where to? Give --out DIR, a directory for the run")
    config = options.config
    given = {"source": options.data}
    data = dataclasses.replace(config.data, **{k: v for k, v in given.items() if v is not None})
    given = {"steps": options.steps, "seed": options.seed}
    run = dataclasses.replace(config.run, **{k: v for k, v in given.items() if v is not None})
    return dataclasses.replace(options, config=dataclasses.replace(config, data=data, run=run))


def _run_training(train: Callable[[], Any]) -> None:
    from vqgan.train.loop import NonFiniteError, Stopped

    try:
        train()
    except Stopped as stopped:
        _fail(str(stopped), stopped.exit_status)
    except NonFiniteError as error:
        _fail(f"{error}; the newest checkpoint is from before that. Lower the learning rate.", 1)


def _train_tokenizer(argv: Sequence[str]) -> None:
    from vqgan.presets import TOKENIZERS
    from vqgan.train.config import TokenizerTraining

    @dataclass(frozen=True)
    class Options:
        config: Annotated[TokenizerTraining, tyro.conf.arg(name="")] = field(
            default_factory=TokenizerTraining
        )
        out: Path | None = None
        """Run directory; the same command goes on with the run that is there."""
        data: str | None = None
        """Source of images, for --data.source: "emoji" or a folder."""
        steps: int | None = None
        """For --run.steps."""
        seed: int | None = None
        """For --run.seed."""

    options = _training("train-tokenizer", argv, TOKENIZERS, Options)
    _start_jax()
    from vqgan.train.tokenizer import train_tokenizer

    _run_training(lambda: train_tokenizer(options.config, options.out))


def _train_prior(argv: Sequence[str]) -> None:
    from vqgan.presets import PRIORS
    from vqgan.train.config import PriorTraining

    @dataclass(frozen=True)
    class Options:
        config: Annotated[PriorTraining, tyro.conf.arg(name="")] = field(
            default_factory=PriorTraining
        )
        tokenizer: Path | None = None
        """Directory of the trained tokenizer."""
        out: Path | None = None
        """Run directory; the same command goes on with the run that is there."""
        data: str | None = None
        """Source of images, for --data.source: "emoji" or a folder."""
        steps: int | None = None
        """For --run.steps."""
        seed: int | None = None
        """For --run.seed."""

    options = _training("train-prior", argv, PRIORS, Options)
    if options.tokenizer is None:
        raise InputError("train-prior: over which codes? Give --tokenizer DIR")
    _start_jax()
    from vqgan.train.prior import train_prior

    _run_training(lambda: train_prior(options.config, options.tokenizer, options.out))


def _demo(argv: Sequence[str]) -> None:
    def options(minutes: float = 9.0, out: Path = Path("runs/demo")) -> tuple[float, Path]:
        """Both stages on the embedded emoji, then pictures and a report.

        Args:
            minutes: Scales the lengths of the trainings, which also stop in time.
            out: Directory for the runs, the models, the pictures and report.json.
        """
        return minutes, out

    minutes, out = _parse(options, argv, "demo")
    if not minutes > 0:
        raise InputError(f"minutes {minutes}: must be more than 0")
    _start_jax()
    from vqgan.demo import demo

    _run_training(lambda: demo(minutes, out))


def _reconstruct(argv: Sequence[str]) -> None:
    def options(model: str, images: tuple[Path, ...], out: Path, size: int = 0) -> Any:
        """Images through a tokenizer and back: a PNG file each, of the input beside the output.

        Args:
            model: Directory of a tokenizer or of a run, or owner/name on the Hugging Face hub.
            images: Files or folders.
            out: Directory for the pictures.
            size: Side length to resize and crop to; 0 keeps each image's own size, less what the
                tokenizer's downsampling does not divide.
        """
        return model, images, out, size

    model, images, out, size = _parse(options, argv, "reconstruct")
    _start_jax()
    from vqgan.commands import reconstruct

    reconstruct(model, images, out, size=size)


def _sample(argv: Sequence[str]) -> None:
    def options(
        model: str,
        out: Path,
        classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = (),
        n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 8,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        seed: int = 0,
    ) -> Any:
        """New images: a PNG file each, and all of them in grid.png.

        Args:
            model: Directory of a pipeline or of a train-prior run, or owner/name on the hub.
            out: Directory for the pictures.
            classes: Names or numbers of classes, `-n` images each; all classes if left out.
            n: Images a class, or in all where the prior is unconditional.
            temperature: Divides the logits; 0 takes the likeliest code.
            top_k: Draw from the k likeliest codes only.
            top_p: Draw from the fewest codes that hold this much probability.
            guidance: Scale of classifier-free guidance; 1 is none.
            seed: Of the randomness.
        """
        sampling = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "guidance": guidance,
        }
        return model, out, classes, n, seed, sampling

    model, out, classes, n, seed, sampling = _parse(options, argv, "sample")
    _start_jax()
    from vqgan.commands import sample

    sample(model, classes, n, out, seed=seed, **sampling)


def _convert(argv: Sequence[str]) -> None:
    def options(
        src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")],
        dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")],
        format: str = "auto",
        config: Path | None = None,
        weights: Literal["ema", "raw"] = "ema",
        to: str | None = None,
        unverified: bool = False,
        licence: str | None = None,
    ) -> Any:
        """Published weights into a model directory, or a tokenizer of ours in a published format.

        Args:
            src: A file of weights, a directory that holds one, or with --to a model of ours.
            dst: The model directory to write; with --to, the file or directory of that format.
            format: Of what is read, out of the list below; "auto" goes by the tensors' names.
            config: The published YAML or JSON, where it does not lie beside the weights.
            weights: Which to take where a file has both: moving averages, or the trained ones.
            to: Write this format, out of those marked with a star below, instead of reading one.
            unverified: Take LPIPS weights that are not the published ones.
            licence: Of the weights, to be noted in provenance.json and on a model card.
        """
        return src, dst, format, config, weights, to, unverified, licence

    if any(word in ("-h", "--help") for word in argv):
        from vqgan.convert.families import describe

        try:
            _parse(options, argv, "convert")
        finally:
            print(describe(), end="")
    src, dst, format, config, weights, to, unverified, licence = _parse(options, argv, "convert")
    from vqgan import convert

    if to is not None:
        notes = convert.export(src, dst, format=to)
        print(f"{src} written as {to}: {dst}")
    else:
        imported = convert.convert(
            src,
            dst,
            format=format,
            config=config,
            weights=weights,
            unverified=unverified,
            licence=licence,
        )
        notes = imported.notes
        print(f"{src} is {imported.format}; {', '.join((_kind(imported.model), *imported.parts))}")
        print(f"written to {dst}")
    for note in notes:
        print(f"note: {note}")


def _kind(model: Any) -> str:
    return type(model).__name__.lower()


def _doctor(argv: Sequence[str]) -> None:
    def options() -> None:
        """Devices, versions, memory, and what is missing."""

    _parse(options, argv, "doctor")
    from vqgan.commands import doctor

    doctor()


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": _demo,
    "train-tokenizer": _train_tokenizer,
    "train-prior": _train_prior,
    "reconstruct": _reconstruct,
    "sample": _sample,
    "convert": _convert,
    "doctor": _doctor,
}
