#!/bin/sh
# Switch adapters on a running server: the base model, adapter A, adapter B, the base model again.
#
#     sh examples/lora_switching.sh http://127.0.0.1:30000 a.safetensors b.safetensors [folder]
#
# Leaves base.png, a.png, b.png and again.png in the folder, and says what it found. The weights change
# in place and come back bit for bit, so base.png and again.png are the same file.
set -eu

url=$1 a=$2 b=$3 folder=${4:-.}
size=${SIZE:-256x256} steps=${STEPS:-8}

call() {
    path=$1
    shift
    curl --silent --show-error --fail-with-body -X POST "$url/v1/$path" "$@"
    echo
}

image() {
    curl --silent --show-error --fail-with-body "$url/v1/images/generations" \
        -H 'Content-Type: application/json' \
        -d '{"prompt": "a red star on a white background", "seed": 7, "response_format": "url",
             "size": "'"$size"'", "num_inference_steps": '"$steps"'}' |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["url"])' |
        while read -r path; do curl --silent --fail "$url$path" -o "$folder/$1.png"; done
}

echo "1. the base model"
image base

echo "2. set adapter A"
call set_lora -d '{"lora_nickname": "lora_a", "lora_path": "'"$a"'", "target": "all", "strength": 0.8}'
image a

echo "3. unmerge A"
call unmerge_lora_weights -d '{"target": "all"}'

echo "4. set adapter B"
call set_lora -d '{"lora_nickname": "lora_b", "lora_path": "'"$b"'", "target": "all", "strength": 1.0}'
curl --silent --fail "$url/v1/list_loras"
echo
image b

echo "5. unmerge B: the base model again"
call unmerge_lora_weights
image again

same() { cmp -s "$folder/$1.png" "$folder/$2.png"; }
if same base a || same a b || same base b; then
    echo "the adapters change nothing" >&2
    exit 1
fi
if ! same base again; then
    echo "the base model did not come back" >&2
    exit 1
fi
echo "A differs from the base, B from A, and the base is back byte for byte."
