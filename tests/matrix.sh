#!/bin/bash
# matrix.sh [WORD...]: the header under every compiler, language, switch and include path that
# is promised to work. With words, only the cases whose name holds one of them. A compiler that
# is absent, or a feature that the machine lacks (LTO plugin, ELF tools), is skipped and counted.
# The last line is "N passed, N failed". MATRIX="gcc,g++ clang,clang++" names the compilers.
#
# A case is a line of shell code with a name; all run in a folder of their own, in parallel.
cd "$(dirname "$0")/.." || exit 1
root=$PWD
jobs=$(nproc 2>/dev/null || echo 2)
work=$root/${B:-build}/matrix
rm -rf "$work" && mkdir -p "$work/cases" && cd "$work" || exit 1
words=("$@") count=0 skipped=0

add() {  # name code: with `|| exit 1` between its steps if there are several
    local word wanted=$((${#words[@]} == 0))
    for word in "${words[@]}"; do [[ $1 == *"$word"* ]] && wanted=1; done
    ((wanted)) || return
    count=$((count + 1))
    local dir
    dir=$(printf '%s/cases/%03d' "$work" $count)
    mkdir -p "$dir"
    echo "$1" >"$dir/name"
    printf '%s\n' "$2" >"$dir/run.sh"
}

# ---- programs -----------------------------------------------------------------------------

# A user of the library; its exit status tells whether tuned kernels are in use. Compilers that
# have none (other machines, the double build, DIFFUSION_NO_SIMD) are told so with -DPLAIN.
cat >user.c <<'END'
#include "diffusion.h"
#include <string.h>
int main(void) {
    df_ctx *ctx = df_ctx_create(NULL);
    int plain;
    if (ctx == NULL) return 2;
    plain = strcmp(df_ctx_isa(ctx), "plain") == 0;
    df_ctx_free(ctx);
#ifdef PLAIN
    return !plain;
#else
    return plain;
#endif
}
END
cp user.c user.cpp
sed '1i #define DIFFUSION_IMPLEMENTATION' user.c >prog.c
sed '1i #define DIFFUSION_IMPLEMENTATION\n#include <diffusion.h>' user.c >angle.c
# Declarations first, in a header of the user's perhaps, the implementation later.
{ echo '#include "diffusion.h"'; echo '#include "diffusion.h"'; cat prog.c; } >later.c
sed 's/diffusion\.h/renamed.h/' prog.c >renamed.c
sed 's,"diffusion\.h",<vendor/diffusion.h>,' prog.c >vendor.c
grep -v include.*diffusion prog.c | grep -v IMPLEMENTATION >bare.c
# The library as a translation unit of its own, as static functions that nobody uses, and with
# an assertion of the user's.
printf '#define DIFFUSION_IMPLEMENTATION\n#include "diffusion.h"\n' >impl.c
cp impl.c impl.cpp
sed '1i #define DIFFUSION_STATIC' impl.c >static.c
sed '1i #define DIFFUSION_STATIC' prog.c >static_a.c
sed 's/int main/int second(void);\nint second/' static_a.c >static_b.c
# The example on the manual's first page.
sed -n '/^ *SYNOPSIS/,/^ *CONTENTS/p' "$root/diffusion.h" | sed '1d;$d' >synopsis.c
cp synopsis.c synopsis.cpp
sed '1i #include <assert.h>\n#define DIFFUSION_ASSERT(x) assert(x)' impl.c >assert.c
mkdir -p plain include/vendor other linked deep/er
cp "$root/diffusion.h" plain/
cp "$root/diffusion.h" include/vendor/
cp "$root/diffusion.h" other/renamed.h
ln -s "$root" linked_folder
ln -s "$root/diffusion.h" linked/diffusion.h

case $(uname -m) in
x86_64 | amd64 | aarch64 | arm64) tuned= ;;
*) tuned=-DPLAIN ;;
esac

# ---- cases --------------------------------------------------------------------------------

strict="-Wall -Wextra -pedantic -Wconversion -Wshadow -Wundef -Werror"
strict_c="$strict -Wstrict-prototypes"
W=$work I=-I$root

languages() {  # cc c++: every language and precision, declarations alone and implementation
    local std real name
    for real in float double; do
        local D=
        [ $real = double ] && D=-DDIFFUSION_DOUBLE
        for std in c99 c11; do
            name="$1 $std $real"
            add "$name: implementation" "$1 -std=$std $D $strict_c $I -fsyntax-only $W/impl.c"
            add "$name: declarations" "$1 -std=$std $D $strict_c $I -fsyntax-only $W/user.c"
        done
        for std in c++11 c++20; do
            name="$2 $std $real"
            add "$name: implementation" "$2 -std=$std $D $strict $I -fsyntax-only $W/impl.cpp"
            add "$name: declarations" "$2 -std=$std $D $strict $I -fsyntax-only $W/user.cpp"
        done
        add "$1 -O2 $real: no warnings, objects in order" \
            "$1 -O2 -std=c99 $D $strict_c $I -c $W/impl.c -o i.o || exit 1; $(object_checks)
             $1 $D $tuned ${D:+-DPLAIN} $I $W/user.c i.o -o p -lm -lpthread && ./p || exit 1
             $2 -std=c++11 $D $strict $tuned ${D:+-DPLAIN} $I $W/user.cpp i.o -o q -lm -lpthread && ./q"
    done
}

# Nothing writable, nothing exported but df_*, nothing that prints or ends the host's program.
object_checks() {
    ((elf)) || return
    cat <<'END'
size -A i.o | awk '$1 ~ /^\.(data|bss|tdata|tbss)(\.|$)/ && $1 !~ /^\.data\.rel\.ro/ && $2 > 0 {
    print "writable memory: " $1 ", " $2 " bytes"; bad = 1 } END { exit bad }' || exit 1
nm i.o | awk '$(NF-1) == "C" { print "common symbol " $NF; bad = 1 } END { exit bad }' || exit 1
nm -g --defined-only i.o | awk '$NF !~ /^df_/ { print "exported: " $NF; bad = 1 }
    END { exit bad }' || exit 1
nm -u i.o | awk '$NF ~ /^_*(abort|exit|_exit|printf|puts|putchar|fprintf|vprintf|perror|stdout|stderr|assert_fail|printf_chk|fprintf_chk|rand|srand)$/ {
    print "calls " $NF; bad = 1 } END { exit bad }' || exit 1
END
    # The float kernels at the user's level: no pragma left them without their instructions.
    [ -z "$D" ] && [ "$(uname -m)" = x86_64 ] && command -v objdump >/dev/null &&
        echo 'objdump -d i.o | grep -q vfmadd || { echo "kernels without FMA"; exit 1; }'
}

switches() {  # cc c++
    local s
    for s in -DDIFFUSION_NO_SIMD -DDIFFUSION_NO_THREADS -DDIFFUSION_NO_STDIO \
        "-DDIFFUSION_NO_SIMD -DDIFFUSION_NO_THREADS -DDIFFUSION_NO_STDIO"; do
        add "$1 ${s//-DDIFFUSION_/}" "$1 -std=c99 $s $strict_c $I -fsyntax-only $W/impl.c"
        add "$2 ${s//-DDIFFUSION_/}" "$2 -std=c++11 $s $strict $I -fsyntax-only $W/impl.cpp"
        add "$1 ${s//-DDIFFUSION_/} runs, and leaves out what it says" \
            "$1 -O0 $s $I -c $W/impl.c -o i.o || exit 1
             case '$s' in *NO_STDIO*) w='fopen|fread|fwrite|fclose|open|read|write|fsync|rename' ;; esac
             case '$s' in *NO_THREADS*) w=\"\$w|pthread_create|pthread_mutex_lock|thrd_create\" ;; esac
             nm -u i.o 2>/dev/null | awk '{ print \$NF }' | sed 's/@.*//' | grep -xE \"\${w:-none}\" && exit 1
             case '$s' in *NO_SIMD*) d=-DPLAIN ;; *) d='$tuned' ;; esac
             $1 \$d $s $I $W/user.c i.o -o p -lm -lpthread && ./p"
    done
    add "$1 ASSERT" "$1 -std=c99 $strict_c $I -fsyntax-only $W/assert.c"
    add "$1 STATIC, nothing used" "$1 -std=c99 $strict_c $I -fsyntax-only $W/static.c"
    add "$2 STATIC, nothing used" "$2 -x c++ -std=c++11 $strict $I -fsyntax-only $W/static.c"
    add "$1 STATIC in two files of one program, nothing exported" \
        "$1 $tuned $I -Wall -Wextra -Werror -c $W/static_a.c && $1 $I -Wall -Wextra -Werror -c $W/static_b.c || exit 1
         if nm -g --defined-only static_a.o | grep -w df_.*; then exit 1; fi
         $1 static_a.o static_b.o -o p -lm -lpthread && ./p"
}

# -O0 is quick; whether the self-include found its way shows in the kernels in use.
include_paths() {  # cc
    local c="$1 -O0 $tuned" L="-o p -lm -lpthread && ./p"
    add "$1 include: relative -I" "cd $W/deep/er && $c -I../../plain ../../prog.c -o p.$1 -lm -lpthread && ./p.$1"
    add "$1 include: relative file name" "cd $W/plain && $c -I. ../prog.c -o p.$1 -lm -lpthread && ./p.$1"
    add "$1 include: symbolic link to the folder" "$c -I$W/linked_folder $W/prog.c $L"
    add "$1 include: symbolic link to the header" "$c -I$W/linked $W/prog.c $L"
    add "$1 include: in a folder, with <vendor/diffusion.h>" "$c -I$W/include $W/vendor.c $L"
    add "$1 include: <diffusion.h>, -isystem" "$c -isystem $W/plain $W/angle.c $L"
    add "$1 include: -include diffusion.h" \
        "$c $I -DDIFFUSION_IMPLEMENTATION -include diffusion.h -include stddef.h $W/bare.c $L"
    add "$1 include: -ffile-prefix-map" "$c $I -ffile-prefix-map=$root=/elsewhere $W/prog.c $L"
    add "$1 include: another name, DIFFUSION_FILE" \
        "$c -I$W/other -DDIFFUSION_FILE='\"renamed.h\"' $W/renamed.c $L"
    add "$1 include: declarations first, implementation later" "$c $I $W/later.c $L"
    add "$1 include: preprocessed first" "$1 $tuned $I -E $W/prog.c -o p.i && $1 -O0 p.i $L"
    add "$1 include: preprocessed, no line marks" "$1 $tuned $I -E -P $W/prog.c -o p.i && $1 -O0 p.i $L"
    case $1 in
    *clang*)
        add "$1 include: precompiled declarations" \
            "$1 $I -x c-header $root/diffusion.h -o d.pch && $c $I -include-pch d.pch $W/prog.c $L"
        add "$1 include: precompiled implementation" \
            "$1 $I -DDIFFUSION_IMPLEMENTATION -x c-header $root/diffusion.h -o d.pch || exit 1
             $c $I -DDIFFUSION_IMPLEMENTATION -include-pch d.pch -include stddef.h $W/bare.c $L" ;;
    *)
        add "$1 include: precompiled declarations" \
            "cp $root/diffusion.h . && $1 -O0 $tuned diffusion.h && $c -Winvalid-pch -Werror -I. $W/later.c $L"
        add "$1 include: precompiled implementation" \
            "cp $root/diffusion.h . && $1 -O0 $tuned -DDIFFUSION_IMPLEMENTATION diffusion.h || exit 1
             $c -I. -Winvalid-pch -Werror -DDIFFUSION_IMPLEMENTATION $W/user.c $L" ;;
    esac
}

programs() {  # cc c++
    local L="-lm -lpthread"
    add "$1 -O2 prog.c -lm reaches the tuned kernels" "$1 -O2 $tuned $I $W/prog.c -o p -lm && ./p"
    if [ -s synopsis.c ]; then
        add "$1: the synopsis compiles" "$1 -std=c99 -Wall -Wextra -Werror $I -fsyntax-only $W/synopsis.c"
        add "$2: the synopsis compiles" "$2 -std=c++11 -Wall -Wextra -Werror $I -fsyntax-only $W/synopsis.cpp"
    fi
    add "$1, $2: implementation in C++, user in C" \
        "$2 -O0 $I -c $W/impl.cpp -o i.o && $1 $tuned $I $W/user.c i.o -o p $L && ./p"
    add "$1: float and double do not link together" \
        "$1 -O0 $I -c $W/impl.c -o f.o && $1 -O0 -DDIFFUSION_DOUBLE $I -c $W/impl.c -o d.o || exit 1
         $1 $tuned $I $W/user.c f.o -o p $L || exit 1
         if $1 -DDIFFUSION_DOUBLE $I $W/user.c f.o -o p $L 2>/dev/null; then echo 'user double, library float: linked'; exit 1; fi
         if $1 $I $W/user.c d.o -o p $L 2>/dev/null; then echo 'user float, library double: linked'; exit 1; fi"
    echo 'int main(void) { return 0; }' >trivial.c
    if $1 -flto trivial.c -o trivial 2>/dev/null; then
        add "$1 -flto" "$1 -flto -O1 $I -c $W/impl.c -o i.o && $1 -flto -O1 $tuned $I $W/user.c i.o -o p $L && ./p"
    else
        skipped=$((skipped + 1))
        echo "skipped: $1 -flto (no linker plugin)"
    fi
}

elf=0
if command -v size nm >/dev/null && [ "$(uname -s)" = Linux ]; then elf=1; fi
for pair in ${MATRIX:-gcc,g++ clang,clang++}; do
    cc=${pair%,*} cxx=${pair#*,}
    if ! command -v "$cc" >/dev/null || ! command -v "$cxx" >/dev/null; then
        echo "skipped: $cc and $cxx (not here)"
        skipped=$((skipped + 1))
        continue
    fi
    programs "$cc" "$cxx"
    languages "$cc" "$cxx"
    switches "$cc" "$cxx"
    include_paths "$cc"
done

# ---- run ----------------------------------------------------------------------------------

one() {  # folder of a case
    cd "$1" || exit 1
    if bash run.sh >out 2>&1; then touch passed; else touch failed; fi
    rm -f -- *.o *.pch *.gch *.i p q
}
export -f one
printf '%s\n' "$work"/cases/* | xargs -P "$jobs" -I{} bash -c 'one {}'
shown=0
for failure in "$work"/cases/*/failed; do
    [ -e "$failure" ] || continue
    dir=${failure%/failed}
    echo "matrix: $(cat "$dir/name")"
    # The first few in full; when one mistake fails a hundred cases, their names are enough.
    if ((shown++ < 6)); then head -n 12 "$dir/out"; else echo "    see $dir/out"; fi
done
passed=$(find cases -name passed | wc -l)
((skipped == 0)) || echo "$skipped skipped"
echo "$passed passed, $((count - passed)) failed"
((passed == count))
