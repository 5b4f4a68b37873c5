#!/bin/bash
# check.sh HEADER: the budgets. Lines of each chapter, width of lines, length of functions,
# time to compile. Prints every figure, what is over its budget with a mark, and fails if any is.
# A chapter opens with a line `// >>name`; the last such line counts (a table of contents may
# come first, without //). Other marks belong to the chapter they stand in.
header=${1:-diffusion.h}
failed=0

# ---- lines -----------------------------------------------------------------------------

awk '
BEGIN {
    # chapter and budget, in the order of the header; "front" is all before the first
    split("front 2400 foundations 900 process 800 prediction 300 samplers 2000 guidance 500 " \
          "likelihood 500 tensors 1800 networks 1500 training 900 flow_maps 800 discrete 700 " \
          "files 700 closed_forms 400 kernels 1500 relatives 500 laboratory 300", word, " ")
    for (i = 1; word[2 * i - 1] != ""; i++) { name[i] = word[2 * i - 1]; budget[i] = word[2 * i] }
    count = i - 1
}
{
    text[NR] = $0
    if (match($0, /^[ \t]*(\/\*+|\*)?[ \t]*\/\/ >>[a-z_]+/)) {
        mark = $0
        sub(/^.*>>/, "", mark)
        sub(/[^a-z_].*/, "", mark)
        if (mark == "closed") mark = "closed_forms"
        if (mark == "maps") mark = "flow_maps"
        for (i = 1; i <= count; i++) if (mark == name[i]) at[i] = NR
    }
}
END {
    at[1] = 1
    for (i = 1; i <= count; i++) if (at[i]) order[++n] = i
    # by place: chapters may stand in another order than the table
    for (i = 2; i <= n; i++)
        for (j = i; j > 1 && at[order[j - 1]] > at[order[j]]; j--) {
            t = order[j]; order[j] = order[j - 1]; order[j - 1] = t
        }
    printf "  %-14s %6s %7s  %s\n", "chapter", "lines", "budget", "comments / all"
    for (i = 1; i <= n; i++) {
        k = order[i]
        from = at[k]; to = i < n ? at[order[i + 1]] - 1 : NR
        lines = to - from + 1
        comments = share(from, to)
        over = lines > budget[k]
        printf "  %-14s %6d %7d  %.0f %%%s\n", name[k], lines, budget[k],
               100 * comments / lines, over ? "   OVER BUDGET" : ""
        bad += over
    }
    printf "  %-14s %6d %7d\n", "all", NR, 15000
    if (NR > 15000) { print "  OVER BUDGET: the whole"; bad++ }
    for (i = 1; i <= count; i++) if (!at[i]) absent = absent " " name[i]
    if (absent) print "  not there yet:" absent
    exit bad > 0
}
# Lines that are comment, wholly or behind code; a block opened on one line lasts to its end.
function share(from, to,   l, n, open) {
    for (l = from; l <= to; l++) {
        if (open || text[l] ~ /\/\// || text[l] ~ /\/\*/) n++
        if (open) { if (text[l] ~ /\*\//) open = 0 }
        else if (text[l] ~ /\/\*/ && text[l] !~ /\/\*.*\*\//) open = 1
    }
    return n
}' "$header" || failed=1

LC_ALL=C.UTF-8 awk '
function wrong(what) { if (++n <= 20) printf "  %s:%d: %s\n", FILENAME, FNR, what }
length($0) > 91 { wrong(length($0) " columns (91 at most)") }
/[ \t]$/ { wrong("blanks at its end") }
/\t/ { wrong("tabulator") }
END { printf "  %d lines too wide, with tabulators or blanks at their end\n", n; exit n > 0 }
' "$header" || failed=1

# ---- functions: from the first line of the head to the brace in column 1 ------------------

awk '
match($0, /^[ \t]*(\/\*+|\*)?[ \t]*\/\/ >>[a-z_]+/) { chapter = substr($0, RSTART, RLENGTH); sub(/.*>>/, "", chapter) }
/^(\/\/|#|\/\*|[ *])/ && !inside && !/\{$/ { if (!/^ /) head = 0; next }
/^[A-Za-z_]/ && !inside && !head { head = FNR; what = $0 }
/^\{/ || /^[^ #].*\{$/ || (/^ .*\) *\{$/ && head && !inside) {
    if (!inside && head && what !~ /^(typedef|struct|enum|union|extern "C")/ && what !~ /=[^=]*\{$/) inside = head
}
/^\}/ {
    if (inside) {
        functions++
        lines = FNR - inside + 1
        if (lines > longest && chapter != "kernels") longest = lines
        if (lines >= 60 && chapter != "kernels") {
            printf "  %s:%d: function of %d lines (59 at most): %s\n", FILENAME, inside, lines, what
            n++
        }
    }
    inside = head = 0
}
/;[ \t]*(\/\/.*|\/\*.*)?$/ && !inside { head = 0 }
(/^$/ || /\}$/) && !inside { head = 0 }
END { printf "  %d functions, the longest %d lines (kernels aside), %d too long\n", functions, longest, n
      exit n > 0 }' "$header" || failed=1

# ---- time of compilation: processor time, so that a busy machine does not matter ----------

dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
printf '#define DIFFUSION_IMPLEMENTATION\n#include "diffusion.h"\n' >"$dir/impl.c"
printf '#include "diffusion.h"\n' >"$dir/user.c"
: >"$dir/empty.c"
cp "$header" "$dir/diffusion.h"

seconds() {  # command...: the least of $repeat runs
    local i best= now
    for ((i = 0; i < repeat; i++)); do
        now=$({ TIMEFORMAT='%3U %3S'; time "$@" >/dev/null 2>&1; } 2>&1 | awk '{ printf "%.3f", $1 + $2 }')
        best=$(echo "$now $best" | awk '{ print ($2 == "" || $1 < $2) ? $1 : $2 }')
    done
    echo "$best"
}
budget() {  # what seconds limit
    echo "$2 $3" | awk -v what="$1" '{ over = $1 > $2
        printf "  %-44s %7.3f s, budget %.3f s%s\n", what, $1, $2, over ? "   OVER BUDGET" : ""
        exit over }' || failed=1
}
for cc in gcc clang; do
    command -v $cc >/dev/null || { echo "  $cc is not here: skipped"; continue; }
    for d in "" -DDIFFUSION_DOUBLE; do
        if ! $cc -O2 $d -c "$dir/impl.c" -o "$dir/impl.o"; then echo "  $cc $d: does not compile"; failed=1; continue; fi
        repeat=2
        budget "$cc -O2 ${d:+double }implementation" "$(seconds $cc -O2 $d -c "$dir/impl.c" -o "$dir/impl.o")" 5
    done
    repeat=9
    with=$(seconds $cc -fsyntax-only "$dir/user.c")
    without=$(seconds $cc -fsyntax-only "$dir/empty.c")
    budget "$cc declarations alone, over an empty file" "$(echo "$with $without" | awk '{ print $1 - $2 }')" 0.05
done
[ $failed = 0 ] && echo "check: all within budget" || echo "check: over budget"
exit $failed
