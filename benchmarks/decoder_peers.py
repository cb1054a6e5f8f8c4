"""The engines that decoders are compared with, each in the interpreter of its own virtual environment.

    python -m venv PEERS/llama; pip install llama-cpp-python gguf   (compiles; CMAKE_ARGS=-DGGML_NATIVE=ON)
    python -m venv PEERS/openvino; pip install openvino-genai
    python -m venv PEERS/onnxruntime; pip install onnxruntime-genai
    python -m venv PEERS/convert; pip install torch "optimum-intel[openvino]" onnxruntime-genai onnx-ir
    python benchmarks/decoder_peers.py prepare CHECKPOINT MODELS PEERS [--kinds llama openvino onnxruntime]
    PEERS/llama/bin/python benchmarks/decoder_peers.py requantize FILE.gguf OUT.gguf q4_0

CHECKPOINT: what decoder_models.py's random wrote. The last line makes MODELS/: q4_0.gguf, q4_k_m.gguf,
openvino-int4-g128/ and onnxruntime-int4/. `worker` is what decoder_speed.py starts: it answers `batch prompt tokens`
on standard input with the seconds of prefill and those of one decode step. No file of medcompile's is imported here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 32000
GGUF_KINDS = {"q4_0": 2, "q4_k_m": 15}
Run = Callable[[int, int, int], tuple[float, float]]
"""batch, prompt tokens, new tokens -> seconds until the first token of all, seconds of each step after it."""


def prepare(checkpoint: Path, models: Path, peers: Path, kinds: list[str]) -> None:
    models.mkdir(parents=True, exist_ok=True)
    convert = peers / "convert" / "bin"
    told: dict[str, int] = {}
    if "llama" in kinds:
        subprocess.run([peers / "llama/bin/python", __file__, "gguf", checkpoint, models], check=True)
    if "openvino" in kinds:
        out = models / "openvino-int4-g128"
        command = [convert / "optimum-cli", "export", "openvino", "-m", checkpoint, "--task"]
        command += ["text-generation-with-past", "--weight-format", "int4", "--sym", "--group-size", "128"]
        subprocess.run([*command, "--ratio", "1.0", out], check=True)
        told[out.name] = (out / "openvino_model.bin").stat().st_size - VOCABULARY * 2048
    if "onnxruntime" in kinds:
        out = models / "onnxruntime-int4"
        command = [convert / "python", "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", out]
        command += ["-p", "int4", "-e", "cpu", "-c", models / "cache", "--extra_options", "int4_accuracy_level=4"]
        subprocess.run(command, check=True)
        shutil.rmtree(models / "cache", ignore_errors=True)
        told[out.name] = (out / "model.onnx.data").stat().st_size - VOCABULARY * 2048 * 4
    _note(models, told)


def _note(models: Path, weight_bytes: dict[str, int]) -> None:
    """Add to what is known of the bytes that a step reads."""
    path = models / "weight_bytes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | weight_bytes, indent=1))


def write_gguf(checkpoint: Path, models: Path) -> None:
    """Q4_0 throughout, and Q4_K_M as llama.cpp mixes it. Rows of q and k stay as they lie: this is for speed alone."""
    import gguf

    path = models / "bf16.gguf"
    config = json.loads((checkpoint / "config.json").read_text())
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_dimension_count(config["head_dim"])
    w.add_vocab_size(VOCABULARY)
    w.add_tokenizer_model("llama")
    words = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    w.add_token_list([*words, *(f"word{i}".encode() for i in range(VOCABULARY - len(words)))])
    w.add_token_scores([0.0] * VOCABULARY)
    w.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - len(words))])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    with (checkpoint / "model.safetensors").open("rb") as file:
        _add_tensors(w, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
    told = {}
    for name in GGUF_KINDS:
        out = models / f"{name}.gguf"
        requantize(path, out, name)
        told[out.stem] = sum(int(t.n_bytes) for t in gguf.GGUFReader(out).tensors if t.name != "token_embd.weight")
    path.unlink()
    _note(models, told)


def requantize(path: Path, out: Path, kind: str) -> None:
    """One GGUF file into another of that kind, even from four bits: llama.cpp has fast kernels for some kinds only."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.pure = GGUF_KINDS[kind], 2, kind == "q4_0"
    settings.allow_requantize = True
    assert not llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(settings))


def _add_tensors(w: Any, data: mmap.mmap) -> None:
    """Every tensor of a safetensors file by llama.cpp's name, matrices as they lie."""
    import gguf
    import numpy as np

    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    parts |= {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"}
    parts |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    size = int.from_bytes(data[:8], "little")
    for name, facts in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        module = name.removesuffix(".weight")
        _, _, layer, part = (*module.split(".", 3), "", "", "")[:4]
        target = names.get(module) or f"blk.{layer}.{parts[part]}"
        begin, end = facts["data_offsets"]
        bits = np.frombuffer(data, np.uint16, (end - begin) // 2, 8 + size + begin).reshape(facts["shape"])
        if bits.ndim == 1:
            w.add_tensor(f"{target}.weight", (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            w.add_tensor(f"{target}.weight", bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)


def transformers(path: Path, threads: int) -> Run:
    """The model in bfloat16 with its own cache: what generate() calls, without what that does around it."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        ids = torch.from_numpy(_prompts(batch, prompt))
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            start = time.perf_counter()
            for i in range(tokens + 1):
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1].argmax(-1, keepdim=True)
                if i == 0:
                    first = time.perf_counter()
        return first - start, (time.perf_counter() - first) / max(tokens, 1)

    return run


def onnxruntime(path: Path, threads: int) -> Run:
    import numpy as np
    import onnxruntime_genai as og

    config = json.loads((path / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    config["search"]["past_present_share_buffer"] = True
    (path / "genai_config.json").write_text(json.dumps(config, indent=1))
    model = og.Model(str(path))

    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        settings = og.GeneratorParams(model)
        length = prompt + tokens + 1
        settings.set_search_options(max_length=length, min_length=length, batch_size=batch, do_sample=False)
        generator = og.Generator(model, settings)
        ids = _prompts(batch, prompt).astype(np.int32)
        start = time.perf_counter()
        generator.append_tokens(ids if batch > 1 else ids[0])
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return first - start, (time.perf_counter() - first) / max(tokens, 1)

    return run


def openvino(path: Path, threads: int) -> Run:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    pipe = genai.LLMPipeline(str(path), "CPU", **settings)

    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        ids = _prompts(batch, prompt)
        asked = genai.GenerationConfig()
        asked.max_new_tokens = asked.min_new_tokens = tokens + 1
        asked.ignore_eos = True
        given = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        start = time.perf_counter()
        result = pipe.generate(given, asked)
        elapsed = time.perf_counter() - start
        first = result.perf_metrics.get_ttft().mean / 1e3
        return first, (elapsed - first) / max(tokens, 1)

    return run


def llama(path: Path, threads: int) -> Run:
    import llama_cpp as c
    import numpy as np

    c.llama_backend_init()
    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    contexts: dict[int, Any] = {}

    def run(batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        if batch not in contexts:
            s = c.llama_context_default_params()
            s.n_ctx, s.n_batch, s.n_ubatch, s.n_seq_max = 1024 if batch == 1 else 256 * batch, 4096, 512, batch
            s.n_threads = s.n_threads_batch = threads
            contexts[batch] = c.llama_init_from_model(model, s)
        context = contexts[batch]
        c.llama_memory_clear(c.llama_get_memory(context), True)
        step = c.llama_batch_init(batch * prompt, 0, 1)

        def decode(rows: list[list[int]], position: int) -> list[int]:
            n = 0
            for sequence, row in enumerate(rows):
                for i, token in enumerate(row):
                    step.token[n], step.pos[n], step.n_seq_id[n] = token, position + i, 1
                    step.seq_id[n][0], step.logits[n] = sequence, i == len(row) - 1
                    n += 1
            step.n_tokens = n
            assert c.llama_decode(context, step) == 0
            ends = [(i + 1) * len(rows[0]) - 1 for i in range(batch)]
            logits = (c.llama_get_logits_ith(context, end) for end in ends)
            return [int(np.ctypeslib.as_array(row, (VOCABULARY,)).argmax()) for row in logits]

        ids = _prompts(batch, prompt).tolist()
        start = time.perf_counter()
        chosen = decode(ids, 0)
        first = time.perf_counter()
        for i in range(tokens):
            chosen = decode([[token] for token in chosen], prompt + i)
        elapsed = time.perf_counter() - first
        c.llama_batch_free(step)
        return first - start, elapsed / max(tokens, 1)

    return run


_seed = 0


def _prompts(batch: int, prompt: int) -> Any:
    """Random token ids that no run had before: caches of prompts find nothing."""
    import numpy as np

    global _seed  # noqa: PLW0603
    _seed += 1
    return np.random.default_rng(_seed).integers(3, VOCABULARY - 1000, (batch, prompt))


KINDS: dict[str, Callable[[Path, int], Run]] = {
    "transformers": transformers,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "llama": llama,
}


def answer(run: Run) -> None:
    """Say ready, then take requests from standard input until it ends. Libraries that print do it elsewhere."""
    for line in sys.stdin:
        prefill_s, step_s = run(*map(int, line.split()))
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps([prefill_s, step_s, peak_mb]), file=REPLIES, flush=True)


REPLIES = sys.stdout


def main() -> None:
    global REPLIES  # noqa: PLW0603
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    prepared = steps.add_parser("prepare")
    prepared.add_argument("checkpoint", type=Path)
    prepared.add_argument("models", type=Path)
    prepared.add_argument("peers", type=Path)
    prepared.add_argument("--kinds", nargs="+", default=["llama", "openvino", "onnxruntime"])
    written = steps.add_parser("gguf")
    written.add_argument("checkpoint", type=Path)
    written.add_argument("models", type=Path)
    again = steps.add_parser("requantize")
    again.add_argument("path", type=Path)
    again.add_argument("out", type=Path)
    again.add_argument("kind", choices=GGUF_KINDS)
    working = steps.add_parser("worker")
    working.add_argument("kind", choices=KINDS)
    working.add_argument("path", type=Path)
    working.add_argument("threads", type=int)
    given = parser.parse_args()
    if given.step == "prepare":
        prepare(*(p.absolute() for p in (given.checkpoint, given.models, given.peers)), given.kinds)
    elif given.step == "gguf":
        write_gguf(given.checkpoint, given.models)
    elif given.step == "requantize":
        requantize(given.path, given.out, given.kind)
    else:
        REPLIES = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        run = KINDS[given.kind](given.path, given.threads)
        print("ready", file=REPLIES, flush=True)
        answer(run)


if __name__ == "__main__":
    main()
