"""What the command says about itself: its purpose, examples, exit codes, and whom it takes for another program's user.

In: nothing. Out: texts. It knows no option, but for what others call ours.
"""

from __future__ import annotations

ABOUT = "Fuse the gate and up projections of MoE checkpoints (safetensors, Orbax)\noffline, split them, prove it."
EXAMPLES = """\
examples:
  convert --inspect ckpt                           what it is, what can be done
  convert --prefuse ckpt fused                     one tensor wi, (E, K, 2N)
  convert --prefuse ckpt fused --dry-run           the plan; nothing is written
  convert --prefuse ckpt v5 --layout transformers  as transformers 5 loads it
  convert --split fused again                      the exact inverse
  convert --merge adapter merged --base ckpt       LoRA added, in float32
  convert --to orbax ckpt maxtext                  for MaxText; back: --to hf
  convert --verify ckpt fused                      equal weights, equal GEMMs
  convert --verify fused                           the digests in its manifest
  convert --digest ckpt fused                      digests of what each holds
  convert --families qwen3_moe                     a model family; no name: all
  convert --layouts                                the words behind --layout
  convert --help verify                            the options of one action
"""
EPILOG = """exit codes: 0 done or equal, 1 a difference, 2 usage, 3 input missing or
corrupt, 4 cannot plan, 5 output exists or in use, 6 disk full or failing (run
again to go on), 70 a bug, 130 / 143 interrupted (run again to go on)
"""
IMAGES = frozenset(
    [f".{end}" for end in ("png", "jpg", "jpeg", "gif", "webp", "tif", "tiff", "bmp", "svg", "pdf", "heic")]
    + [f"-{word}" for word in ("resize", "quality", "crop", "rotate", "density")]
)
"""How files end, and options begin, of the other program that is called `convert`."""
_ANSWERS = {
    "--output": "the output is the second path",
    "--input": "the input is the first path",
    "--in-place": "the input is never modified; give a second path",
    "--verbose": "--dry-run shows the plan, --debug tracebacks",
    "--device": "conversions use no GPU or TPU; --verify takes what JAX finds (JAX_PLATFORMS)",
    "--token": "nothing is downloaded here; hf download does",
    "--push-to-hub": "nothing is uploaded here; hf upload does",
    "--yes": "nothing is asked; --overwrite replaces an output",
    "--no-overwrite": "nothing is replaced without --overwrite; leave it out",
    "--no-verify": "nothing is verified without --verify; leave it out",
    "--no-progress": "did you mean --progress none?",
    "--log": "--debug shows tracebacks, --progress plain is for logs",
    "--dtype": "types stay as they are; --dequantize computes bfloat16 of quantised weights",
    "--tolerance": "weights are compared bit for bit; leave it out",
    "--lazy": "tensors are always streamed, within --memory; leave it out",
    "--tokenizer": "tokenizer and config come along; leave it out",
    "--trust-remote-code": "no code of a model is run; leave it out",
    "--ep": "who loads experts divides them; leave it out (--mesh expert=4 cuts the chunks of an Orbax output so)",
    "->": "the input and the output are two words",
}
_SAME = {
    "--output": "-o --out --outfile --output-file --output-dir --output-path --out-dir --out-path --save-dir --save-path "
    "--save-to --dest --dst --destination --target --base-output-directory --maxtext-model-path --local-dir",
    "--input": "-i --in --input-dir --input-path --model --model-dir --model-path --model-name-or-path --checkpoint "
    "--checkpoint-dir --checkpoint-path --ckpt --ckpt-dir --ckpt-path --load-dir --load-path --load-parameters-path --source "
    "--src --base-model-path --path",
    "--in-place": "--inplace --delete-original",
    "--prefuse": "--fuse --pre-fuse --join",
    "--split": "--unfuse --un-fuse --defuse",
    "--verify": "--compare --diff --check --equal",
    "--inspect": "--info --show --describe",
    "--families": "--list --models",
    "--digest": "--sha256 --hash --checksum",
    "--overwrite": "--force -f --exist-ok --overwrite-output",
    "--resume": "--continue",
    "--no-resume": "--clean --fresh",
    "--dry-run": "-n --plan --simulate --test --what-if --check-only --dryrun",
    "--quiet": "-q -s --silent",
    "--help": "-? --? --usage --help-all",
    "--version": "-V",
    "--verbose": "-v -vv",
    "--jobs": "--threads --workers -j -t --num-workers --max-workers --nproc --parallel --num-threads",
    "--memory": "--ram -m --mem --max-memory --low-cpu-memory --low-cpu-mem-usage",
    "--max-shard-size": "--shard-size --out-shard-size --split-max-size",
    "--layout": "--target-layout --output-layout",
    "--shards": "--tp --tp-size --tensor-parallel --tensor-parallel-size --tensor-model-parallel-size "
    "--target-tensor-parallel-size",
    "--ep": "--ep-size --expert-parallel --expert-parallel-size --expert-model-parallel-size --enable-expert-parallel "
    "--target-ep",
    "--scan": "--scan-layers",
    "--family": "--model-type --model-size --model-name --arch --architecture",
    "--to": "--format --output-format --saver",
    "--device": "--cuda --gpu --gpus --num-gpus --tpu --cpu --hardware --simulated-cpu-devices-count",
    "--token": "--hf-token --hf-access-token --revision --cache-dir --repo-id --repo-type --include --exclude",
    "--push-to-hub": "--upload --private --hub-model-id",
    "--yes": "-y",
    "--no-verify": "--skip-verify",
    "--log": "--log-level",
    "--dtype": "--outtype --torch-dtype --weight-dtype --bf16 --fp16 --fp8 --half --quantization --quantize --load-in-4bit "
    "--load-in-8bit",
    "--tolerance": "--tol --rtol --atol",
    "--lazy": "--no-lazy --lazy-unpickle --lazy-load-tensors --use-temp-file",
    "--tokenizer": "--tokenizer-path --copy-tokenizer --vocab-only",
}
"""Options of ours, or those above -> what other programs call them (llama.cpp, MaxText, mergekit, Megatron, vLLM, hf)."""
SAME = {word: flag for flag, words in _SAME.items() for word in (flag, *words.split())}
MEANT = _ANSWERS | {word: _ANSWERS.get(flag, f"did you mean {flag}?") for word, flag in SAME.items()}
"""Options of other programs -> what is said of them."""
STRAY = (
    (r"[\u2010-\u2015\u2212]", "{0} begins with a dash that a page has made; type --"),
    (r"[\u201c\u201d\u2018\u2019]", "{0} begins with a quote that a page has made; type it anew"),
    (r"[A-Za-z]\w*=", "{0} is no option; they begin with --, such as --layout concat"),
    (r"(?i)(yes|no|true|false|on|off)$", "a switch takes no value; leave out {0}"),
    (r"(?i)(to|into|from|and|with)$", "leave out {0}"),
    (r"convert$", "leave out the second word {0}"),
    (r"(?i)[kmgtp]i?b$", "a size is one word: write {0} without a space before it"),
)
"""How words begin that are no paths, where there are too many paths -> what is said of the first one."""
OTHER_PROGRAM = "this converts MoE checkpoints; for pictures, call ImageMagick's convert by its full path, or magick"
