#!/bin/bash
# test_user.sh: what a user does by hand. The README's program compiles and runs; NaN is found
# although the compiler was told that there is none (-Ofast); the examples train, save, load,
# and refuse bad input with one sentence that names the file, a failing status, no new file.
cd "$(dirname "$0")/.." || exit 1
root=$PWD B=${B:-build} CC=${CC:-cc}
work=$root/$B/user
rm -rf "$work" && mkdir -p "$work/in" "$work/out" || exit 1
passed=0 failed=0

check() {  # name, then a command that must succeed
    local name=$1
    shift
    if "$@" >"$work/log" 2>&1; then passed=$((passed + 1)); return; fi
    failed=$((failed + 1))
    echo "user: $name"
    tail -n 5 "$work/log"
}

# ---- the README's program, as it stands ----
readme() {
    awk '/^```c$/ && !done { on = 1; next } /^```$/ { if (on) done = 1; on = 0 } on' \
        README.md >"$work/prog.c"
    [ "$(wc -l <"$work/prog.c")" -gt 15 ] || return 1
    $CC -O2 -I. "$work/prog.c" -o "$work/prog" -lm || return 1
    [ "$("$work/prog" | wc -w)" = 2 ]
}
check "the README's program prints two numbers" readme

# ---- -Ofast ----
ofast() {  # test program, names of tests
    $CC -Ofast -w -I. -DDIFFUSION_IMPLEMENTATION "tests/$1.c" -o "$work/$1" -lm || return 1
    "$work/$1" "${@:2}"
}
check "NaN from a model is found under -Ofast" ofast test_samplers nan_
check "NaN in data and weights is found under -Ofast" ofast test_training nonfinite

# ---- the examples ----
points=$root/$B/01_points images=$root/$B/02_images
samplers=$root/$B/03_samplers disguises=$root/$B/04_disguises
checkpoint=$root/$B/05_checkpoint mpi=$root/$B/06_mpi digits=$root/$B/08_digits
cd "$work/out" || exit 1
little="--steps 20 --n 300 --sample-steps 5"

refused() {  # word that the sentence must hold, program, arguments
    local word=$1
    shift
    "$@" >"$work/said" 2>"$work/error" </dev/null && { echo "accepted"; return 1; }
    grep -qF -- "$word" "$work/error" || { cat "$work/error"; return 1; }
    [ "$(head -n 1 "$work/error" | wc -c)" -gt 20 ] || return 1
    [ "$(wc -l <"$work/error")" = 1 ] || [ "$word" = --bogus ] || { cat "$work/error"; return 1; }
    [ -z "$(ls -A)" ] || { echo "left behind:"; ls; rm -rf ./*; return 1; }
}
word() { printf "%b" "\\x${1:0:2}\\x${1:2:2}\\x${1:4:2}\\x${1:6:2}"; }
idx() { for w in "$@"; do word "$w"; done; }  # big-endian words
yes '0.5,1.5' | head -n 30 >../in/good.csv
{ cat ../in/good.csv; echo '1,nan'; } >../in/nan.csv
{ cat ../in/good.csv; echo '1,1e400'; } >../in/inf.csv
{ cat ../in/good.csv; echo '1'; } >../in/ragged.csv
{ cat ../in/good.csv; echo '1,word'; } >../in/word.csv
head -n 3 ../in/good.csv >../in/few.csv
: >../in/empty
{ idx 00000803 00000020 00000004 00000004; head -c 512 /dev/zero; } >../in/good.idx
head -c 300 ../in/good.idx >../in/short.idx
{ idx 00000801 00000020 00000004 00000004; head -c 512 /dev/zero; } >../in/magic.idx
{ idx 00000803 ffffffff ffffffff ffffffff; head -c 512 /dev/zero; } >../in/absurd.idx
{ idx 00000803 00989680 00000200 00000200; head -c 512 /dev/zero; } >../in/promises.idx
{ idx 00000803 00000020 00000000 00000004; head -c 512 /dev/zero; } >../in/flat.idx
head -c 9 ../in/good.idx >../in/header.idx
{ idx 00000801 00000020; printf '\000\001%.0s' $(seq 16); } >../in/labels.idx
head -c 20 ../in/labels.idx >../in/few_labels.idx
head -c 11520 /dev/zero | tr '\000' '\077' >../in/raw
printf '\000\000\200\177%.0s' $(seq 2880) >../in/infinite
mkdir -p ../in/folder ../in/nothing
for i in $(seq 20); do echo no picture >../in/folder/$i.png; done
{ idx 00000803 00000020 0000001b 0000001b; head -c 23328 /dev/zero; } >../in/odd.idx
gzip -c ../in/good.idx >../in/good.idx.gz 2>/dev/null || printf '\037\213' >../in/good.idx.gz
outputs="--save $work/out/net --picture $work/out/picture.png"
for f in nan inf ragged word few missing; do
    check "points: $f.csv" refused "../in/$f.csv" "$points" $outputs "../in/$f.csv"
done
check "points: empty file" refused ../in/empty "$points" $outputs ../in/empty
check "points: a folder" refused ../in "$points" $outputs ../in
for f in short magic absurd promises flat header missing; do
    check "images: $f.idx" refused "../in/$f.idx" "$images" $outputs "../in/$f.idx"
done
check "images: empty file" refused ../in/empty "$images" $outputs ../in/empty
check "images: gzip" refused zcat "$images" $outputs ../in/good.idx.gz
check "images: few labels" refused ../in/few_labels.idx "$images" $outputs ../in/good.idx \
    --labels ../in/few_labels.idx
check "images: images for labels" refused ../in/good.idx "$images" $outputs ../in/good.idx \
    --labels ../in/good.idx
check "images: raw floats of another size" refused ../in/raw "$images" $outputs ../in/raw \
    --shape 1,7,7
check "images: raw floats, infinite" refused "not finite" "$images" $outputs ../in/infinite \
    --shape 1,12,12
check "images: a shape" refused 2,8,8 "$images" $outputs ../in/raw --shape 2,8,8
check "images: a folder without pictures" refused ../in/nothing "$images" $outputs ../in/nothing
pictures=../in/folder                 # what is wrong is said of the file, or of a build without
check "images: a folder of no pictures" refused "$pictures/1.png" "$images" $outputs "$pictures"
check "points: unknown option" refused --bogus "$points" $outputs --bogus
check "points: no steps" refused "--steps 0" "$points" $outputs --steps 0
check "points: unknown sampler" refused eulr "$points" $outputs --method eulr
check "points: unwritable" refused /nowhere/net "$points" --save /nowhere/net \
    --picture "$work/out/p.png"
check "points: no checkpoint" refused ../in/good.csv "$points" $outputs --load ../in/good.csv

check "points: trains" "$points" $little $outputs --data swissroll
check "points: loads" "$points" $little --load net --method heun --picture picture.png \
    --data swissroll --csv samples.csv
check "points: 300 samples as CSV" [ "$(wc -l <samples.csv)" = 300 ]
check "points: a CSV file" "$points" $little $outputs ../in/good.csv
check "images: trains" "$images" $little --width 8 --save images.net --picture images.png
check "images: loads" "$images" $little --load images.net --picture images.png
check "images: a net of points is refused" bash -c "! '$images' $little --load net"
piped() { "$images" $little --save pipe --picture picture.png - <../in/good.idx; }
check "images: a pipe" piped
odd() {
    "$images" $little --save odd --picture picture.png ../in/odd.idx && return 1
    grep -q "24 and 28" "$work/log"
}
check "images: a size that does not halve" odd
check "images: raw floats" "$images" $little --save raw --picture picture.png ../in/raw \
    --shape 1,12,12
brief="--steps 40 --n 10 --sample-steps 2 --width 8 --picture picture.png ../in/good.idx"
brief="$brief --labels ../in/labels.idx"
stopped() {  # Ctrl-C, or the end if that was faster; then on: as if nothing had been
    "$images" $brief --save whole --log log.csv || return 1
    [ "$(wc -l <log.csv)" = 3 ] || return 1
    "$images" $brief --save parts --checkpoint-every 1 &
    local job=$!
    while kill -0 $job && ! [ -s parts.resume ] && ! [ -s parts ]; do sleep 0.02; done
    kill -INT $job
    wait $job
    [ $? != 130 ] || "$images" $brief --save parts --checkpoint-every 1 --resume || return 1
    cmp whole parts && ! [ -e parts.resume ]
}
check "images: stopped, resumed, the same bits" stopped
check "images: a dit" "$images" $brief --net dit --save dit
check "images: an mlp" "$images" $brief --net mlp --save mlp
few="--sample-steps 4 --n 4 --picture picture.png"
check "checkpoint: of our own" "$checkpoint" whole --method unipc --guidance 2 $few
check "checkpoint: a folder" "$checkpoint" whole --export folder $few
check "checkpoint: ... and back" "$checkpoint" folder --clip 1 --grid quadratic $few
peers=$root/tests/golden/nets/unet/legacy_attention_names
check "checkpoint: of diffusers" "$checkpoint" "$peers" --clip 1 --grid trailing $few
painted() {
    "$checkpoint" whole --img2img picture.png --strength 0.5 $few || return 1
    "$checkpoint" whole --inpaint picture.png --mask picture.png $few
}
if [ -e picture.png ]; then check "checkpoint: img2img, inpainting" painted; fi
check "digits: runs, and tells bad samples" bash -c "! '$digits' $brief --reader-steps 20 \
    --save net2 && ls net2"
if [ -x "$mpi" ] && command -v mpirun >/dev/null; then
    check "mpi: two processes as one" mpirun --allow-run-as-root --oversubscribe -n 2 "$mpi"
fi

check "samplers: all of them, on the mixture" "$samplers" --n 300 --sample-steps 48 \
    --picture picture.png
check "samplers: of a checkpoint" "$samplers" --load net --n 100 --sample-steps 16 \
    --method heun --picture picture.png
listed() { [ "$("$samplers" --list | wc -l)" -gt 55 ]; }
check "samplers: a list" listed
check "disguises" "$disguises" --n 10 --picture picture.png
# Lessons that take seconds, as they are: they fail if a claim does not hold.
for lesson in 09_langevin_lens 11_ode_sde 12_vae_is_t1 16_likelihood 17_marginals; do
    check "$lesson" "$root/$B/$lesson" --picture picture.png
done
rm -rf ./*
for lesson in 10_one_network 13_langevin_robustness 14_score_matching 15_flow_and_node 18_price_list; do
    check "$lesson: an option that is none" refused --bogus "$root/$B/$lesson" --bogus
    check "$lesson: a value that is none" refused --seed "$root/$B/$lesson" --seed x
done
check "samplers: unknown" refused eulr "$samplers" --method eulr --picture "$work/out/p.png"
check "samplers: no checkpoint" refused ../in/good.csv "$samplers" --load ../in/good.csv \
    --picture "$work/out/p.png"

echo "$passed passed, $failed failed"
[ $failed = 0 ]
