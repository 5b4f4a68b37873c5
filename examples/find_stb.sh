#!/bin/sh
# find_stb.sh OUT [STB]: writes to OUT the compiler options that find stb_image_write.h, which
# the examples draw their PNG files with, or -DDRAW_NO_STB: the examples then do without.
#
# It is looked for in STB (a folder), by pkg-config, in the usual folders; else Debian's package
# libstb-dev is fetched and unpacked beside OUT: no root needed, nothing installed.
# STB=none does without; STB=fetch passes over what the system has.
out=$1 stb=$2
dir=$(dirname "$out")
header=stb_image_write.h
mkdir -p "$dir"

finish() {  # options: OUT is rewritten only if they changed, so that nothing is built in vain
    [ "$1" = "$(cat "$out" 2>/dev/null)" ] || echo "$1" >"$out"
    exit 0
}
try() {  # folder
    [ -r "$1/$header" ] && finish "-isystem $1"
}

if [ "$stb" = none ]; then finish -DDRAW_NO_STB; fi
if [ -n "$stb" ] && [ "$stb" != fetch ]; then
    try "$stb"
    try "$stb/stb"
    echo "find_stb.sh: no $header in STB=$stb" >&2
    exit 1
fi
if [ "$stb" != fetch ]; then
    for option in $(${PKG_CONFIG:-pkg-config} --cflags-only-I stb 2>/dev/null); do
        try "${option#-I}"
        try "${option#-I}/stb"
    done
    for folder in /usr/include /usr/local/include /opt/homebrew/include /opt/local/include; do
        try "$folder/stb"
        [ -r "$folder/$header" ] && finish ""  # in the compiler's own path, most likely
    done
fi
try "$dir/stb/usr/include/stb"

# Fetch, once: a failure is remembered in OUT until `make clean`, local folders are not.
fetch() {
    opt="-qq -o APT::Sandbox::User=$(id -un) -o Acquire::Retries=0 -o Acquire::http::Timeout=15"
    mkdir -p "$dir/stb/lists/partial" "$dir/stb/cache/archives/partial"
    cd "$dir/stb" || return 1
    # The machine's package lists if it has any, else lists of our own: neither needs root.
    own="-o Dir::State::lists=$PWD/lists -o Dir::Cache=$PWD/cache"
    timeout 60 apt-get $opt download libstb-dev 2>/dev/null || {
        timeout 120 apt-get $opt $own update &&
            timeout 60 apt-get $opt $own download libstb-dev
    } || return 1
    dpkg -x libstb-dev_*.deb . && rm -rf lists cache
}
if ! grep -qs DRAW_NO_STB "$out" && command -v apt-get >/dev/null && command -v dpkg >/dev/null
then
    echo "  fetching libstb-dev into $dir/stb (for the examples' pictures)"
    (fetch) >"$dir/stb.log" 2>&1
    try "$dir/stb/usr/include/stb"
fi
grep -qs DRAW_NO_STB "$out" || echo "  no $header: the examples will draw no pictures (install" \
    "your system's stb package, or name its folder: make STB=folder)"
finish -DDRAW_NO_STB
