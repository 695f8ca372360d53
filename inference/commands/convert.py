"""`draftsmith convert SRC OUT --to FORMAT`: an existing drafter's directory in the format of another engine."""

from pathlib import Path

from draftsmith.inference.commands._args import parser
from draftsmith.inference.formats.convert import FORMATS, WRITABLE, convert
from draftsmith.inference.nets.eagle_head import EagleConfig


def main(argv: list[str]) -> int:
    made = parser(
        "convert",
        "Write an existing drafter in the format of another engine; what was written is read back and compared.",
        """draftsmith convert exports/eagle exports/for-vllm --to speculators --target exports/target
        draftsmith convert downloads/EAGLE3-x exports/x --to specforge --target models/x --allow-pickle""",
    )
    made.add_argument("source", metavar="SRC", type=Path, help="directory of the drafter, of any known format")
    made.add_argument("out", metavar="OUT", type=Path, help="directory to make")
    made.add_argument("--to", required=True, choices=WRITABLE, help="; ".join(f"{n}: {FORMATS[n]}" for n in WRITABLE))
    made.add_argument(
        "--from", dest="format", choices=tuple(FORMATS), help="format of SRC (default: told by its files, or refused)"
    )
    made.add_argument("--target", metavar="DIR", type=Path, help="the target: its depth, special ids and path are used")
    made.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read pytorch_model.bin (weights only; needs the train extra)",
    )
    made.add_argument("--overwrite", action="store_true", help="replace an export that is already there")
    given = made.parse_args(argv)
    record = convert(
        given.source,
        given.out,
        given.to,
        target=given.target,
        format=given.format,
        allow_pickle=given.allow_pickle,
        overwrite=given.overwrite,
    )
    for note in record.notes:
        print(f"note   {note}")
    if isinstance(record.fields, EagleConfig):
        for name in ("aux_layers", "draft_vocab_size", "rope"):
            origin = record.origins.get(name, "config.json")
            value = getattr(record.fields, name)
            print(f"read   {name} {list(value) if isinstance(value, tuple) else value} ({origin})")
    print(f"wrote  {given.out}: {len(record.tensors)} tensors, {record.format} -> {given.to}, read back bit-equal")
    return 0
