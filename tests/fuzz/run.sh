#!/bin/sh
# run.sh program runs: one fuzzer over its corpus, which begins with files that are whole.
program=$1 runs=$2 name=$(basename "$1") corpus=$1.corpus
mkdir -p "$corpus"
case $name in
fuzz_config) cp tests/golden/nets/unet/fourier_time/config.json "$corpus/unet"
             cp tests/golden/nets/dit/dit_bf16/config.json "$corpus/dit"
             printf '{"_class_name":"DiTTransformer2DModel","activation_fn":"gelu-approximate","attention_bias":true,"attention_head_dim":8,"dropout":0.0,"in_channels":4,"norm_elementwise_affine":false,"norm_eps":1e-05,"norm_num_groups":32,"norm_type":"ada_norm_zero","num_attention_heads":2,"num_embeds_ada_norm":3,"num_layers":1,"out_channels":8,"patch_size":2,"sample_size":4,"upcast_attention":false}' > "$corpus/peer"
             printf '{"beta_end":0.02,"beta_schedule":"linear","beta_start":0.0001,"num_train_timesteps":9,"prediction_type":"epsilon","rescale_betas_zero_snr":true,"clip_sample":[{"a":null}]}       ' > "$corpus/scheduler" ;;
fuzz_checkpoint | fuzz_weights) "$program" --seeds="$corpus" ;;
*) head -c 3000 tests/golden/nets/unet/unusual_header/diffusion_pytorch_model.safetensors > "$corpus/cut" ;;
esac
echo "  FUZZ $name, $runs inputs"
"$program" -runs="$runs" -max_len=16384 -timeout=20 -rss_limit_mb=2000 -verbosity=0 -print_final_stats=1 \
    -artifact_prefix="$program." "$corpus" 2>"$program.log" || { tail -40 "$program.log"; exit 1; }
grep number_of_executed_units "$program.log"
