#!/bin/sh
# run.sh JOBS FILTER PROGRAM...: runs test programs and scripts (*.sh), prints the output of
# those that fail, and one last line with the sum: "N passed, N failed".
#   RUNNER   put before each program (valgrind)
#   LIMIT    seconds after which a program is stopped
#   B        build folder: logs go to $B/logs
# A program that ends without its own last line, or fails without a failed check, counts as
# one more failure. Scripts use all cores themselves, so they run one after the other, last.
jobs=$1 filter=$2
shift 2
B=${B:-build}
export B RUNNER LIMIT
logs=$B/logs
limit=
command -v timeout >/dev/null && limit="timeout ${LIMIT:-1800}"

run_one() {  # program log
    start=$(date +%s)
    case $1 in
    *.sh) $limit bash "$1" $filter >"$2" 2>&1 ;;
    *) $limit $RUNNER ./"$1" $filter >"$2" 2>&1 ;;
    esac </dev/null
    status=$?
    tally=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$2" | tail -n 1)
    if [ -z "$tally" ]; then
        case $status in
        124) why="took longer than ${LIMIT:-1800} s" ;;
        137) why="was killed" ;;
        139) why="crashed (segmentation fault)" ;;
        134) why="aborted" ;;
        *) why="stopped early with exit status $status" ;;
        esac
        echo "$1 $why" >>"$2"
        tally="0 passed, 1 failed"
    else
        failed=${tally#* passed, }
        failed=${failed% failed}
        if [ "$status" -ne 0 ] && [ "$failed" -eq 0 ]; then
            echo "$1 failed no check, but its exit status is $status" >>"$2"
            tally="${tally%% passed*} passed, 1 failed"
        fi
    fi
    echo "$tally" >"$2.tally"
    line=$(printf '  %-36s %s  (%s s)' "$1" "$tally" $(($(date +%s) - start)))
    case $tally in
    *" 0 failed") printf '%s\n' "$line" ;;
    *) grep -vE '^[0-9]+ passed, [0-9]+ failed$' "$2" | { cat; printf '%s\n' "$line"; } ;;
    esac
}

if [ "$jobs" = one ]; then  # called by xargs below
    run_one "$1" "$logs/$(basename "$1").log"
    exit 0
fi

rm -rf "$logs"
mkdir -p "$logs"
[ $# -gt 0 ] || echo "no test program of that name"
programs= scripts=
for p in "$@"; do
    case $p in *.sh) scripts="$scripts $p" ;; *) programs="$programs $p" ;; esac
done
[ -z "$programs" ] || printf '%s\n' $programs | xargs -P "$jobs" -n 1 sh "$0" one "$filter"
for p in $scripts; do sh "$0" one "$filter" "$p"; done

cat "$logs"/*.tally 2>/dev/null | awk '{ p += $1; f += $3 } END {
    printf "%d passed, %d failed\n", p, f
    exit f > 0 || p == 0 }'
