# diffusion.h: `make help` lists the targets. Everything built goes under build/.
#
#   CC, CXX, CFLAGS, LDLIBS   as usual; gcc and clang both work
#   T=name                    make test T=tensors: only test programs of that name
#   ARGS=name                 make test T=tensors ARGS=softmax: only tests of that name;
#                             make demo, make bench: arguments of the program
#   GOLDEN=folder             make test-golden: recorded trajectories, more than tests/golden
#   STB=folder                where stb_image_write.h is (STB=none: no pictures)

PREFIX  ?= /usr/local
DESTDIR ?=
CFLAGS  ?= -O2 -g -Wall -Wextra
LDLIBS  ?= -lm -lpthread
B       ?= build
T       ?=
ARGS    ?=
STB     ?=
SAN     ?=
JOBS    := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export CC CXX

# Without -j, use all cores.
ifeq ($(MAKELEVEL)$(filter -j% --jobserver%,$(MAKEFLAGS)),0)
MAKEFLAGS += -j$(JOBS)
endif

# A program that defines DIFFUSION_IMPLEMENTATION holds the library, the others link it.
# What needs MPI is built where mpicc is.
mpicc    := $(shell command -v mpicc 2>/dev/null)
without  := $(if $(mpicc),,examples/06_mpi.c)
sources  := $(wildcard tests/test_*.c examples/[0-9]*.c tests/bench/*.c)
sources  := $(filter-out $(without),$(sources))
alone    := $(shell grep -l 'define DIFFUSION_IMPLEMENTATION' $(sources) /dev/null)
tests    := $(patsubst tests/%.c,%,$(filter tests/test_%,$(sources)))
tests_a  := $(patsubst tests/%.c,%,$(filter tests/test_%,$(alone)))
others   := $(basename $(notdir $(filter-out tests/test_%,$(sources))))
others_a := $(basename $(notdir $(filter-out tests/test_%,$(alone))))
examples := $(patsubst examples/%.c,$(B)/%,$(filter examples/%,$(sources)))
benches  := $(patsubst tests/bench/%.c,$(B)/%,$(filter tests/bench/%,$(sources)))

# What T chooses: test programs in both precisions (_f float, _d double), and scripts.
pick      = $(strip $(foreach t,$(1),$(if $(T),$(if $(findstring $(T),$(t)),$(t)),$(t))))
programs := $(foreach t,$(call pick,$(tests)),$(B)/$(t)_f $(B)/$(t)_d)
scripts  := $(call pick,$(wildcard tests/test_*.sh) tests/matrix.sh)
run       = B=$(B) sh tests/run.sh $(JOBS) "$(ARGS)"

.PHONY: all library tests examples demo lessons test test-golden test-long bench check asan \
        ubsan tsan memcheck sanitized fuzz install uninstall clean help FORCE
.DELETE_ON_ERROR:

all: library tests examples     ## the library, its tests and the examples
library: $(B)/diffusion_f.o $(B)/diffusion_d.o  ## one object for each precision
tests: $(programs)              ## the test programs
examples: $(examples)           ## the examples

demo: $(B)/01_points            ## the main job: train on points, sample, measure, draw
	@$(B)/01_points $(ARGS)

# From the third on, but for those that want a checkpoint, MPI or a quarter of an hour.
lessons: $(examples)            ## the examples that check a claim, one after the other
	@for e in $(filter-out %/01_points %/02_images %/05_checkpoint %/06_mpi %/08_digits,$(examples)); do \
	  $$e >$$e.log 2>&1 || { tail -20 $$e.log; echo "$$e failed"; exit 1; }; \
	  echo "  $$e: its claims hold"; \
	done

test: $(programs) $(examples)   ## all tests; the last line is "N passed, N failed"
	@$(run) $(programs) $(scripts)

golden = $(B)/test_golden_d $(B)/test_golden_f
test-golden: $(golden)          ## all recorded trajectories of a folder: GOLDEN=folder
	@GOLDEN="$(or $(GOLDEN),tests/golden)" $(run) $(golden)

test-long: $(programs)          ## the same with the long training runs
	@DF_TEST_LONG=1 $(run) $(programs)

bench: $(benches)               ## the benchmark: one JSON line for each case
	@for b in $(benches); do $$b $(ARGS) || exit 1; done

check:                          ## the budgets: lines, functions, time to compile
	@bash tests/check.sh diffusion.h

# Sanitizers run the same tests, made shorter by DF_TEST_SHORT, in a build folder of their
# own: the thread sanitizer those that speak of threads, valgrind memcheck_tests, float.
memcheck_tests ?= foundations tensors networks files training
tsan_tests := $(shell grep -il threads $(wildcard tests/test_*.c) /dev/null)
tsan_tests := $(call pick,$(tsan_tests:tests/%.c=%))
again = +@$(MAKE) --no-print-directory B=build/$@ sanitized \
        CFLAGS="-O1 -g -Wall -Wextra -fno-omit-frame-pointer -DDF_TEST_SHORT"
export ASAN_OPTIONS ?= detect_leaks=1:allocator_may_return_null=1
export UBSAN_OPTIONS ?= print_stacktrace=1
, := ,

asan:                           ## with the address and undefined-behaviour sanitizers
	$(again) SAN="-fsanitize=address$(,)undefined -fno-sanitize-recover=all"
ubsan:                          ## with the undefined-behaviour sanitizer alone, at -O2
	$(again) SAN="-O2 -fsanitize=undefined -fno-sanitize-recover=all"
tsan:                           ## with the thread sanitizer
	$(again) SAN=-fsanitize=thread programs="$(foreach f,f d,$(tsan_tests:%=build/tsan/%_$(f)))"
memcheck:                       ## under valgrind
	$(again) RUNNER="valgrind -q --leak-check=full --error-exitcode=9" \
	  programs="$(filter $(memcheck_tests:%=build/memcheck/test_%_f),\
	              $(patsubst %,build/memcheck/%_f,$(call pick,$(tests))))"
# Each target runs RUNS inputs, beginning with files that are whole: `make fuzz RUNS=100000`.
RUNS ?= 10000000
fuzzers := $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
fuzz: $(fuzzers:%=$(B)/%)       ## hostile bytes, by libFuzzer (clang), with sanitizers
	@for f in $(fuzzers); do sh tests/fuzz/run.sh $(B)/$$f $(RUNS) || exit 1; done
$(B)/fuzz_%: tests/fuzz/fuzz_%.c tests/fuzz/fuzz.h diffusion.h
	@mkdir -p $(B)
	clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I. $< -o $@ -lm -lpthread

sanitized: $(programs)
	@RUNNER="$(RUNNER)" $(run) $(programs)

install: $(B)/diffusion.pc      ## the header and diffusion.pc, under DESTDIR and PREFIX
	install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/share/pkgconfig
	install -m 644 diffusion.h $(DESTDIR)$(PREFIX)/include/
	install -m 644 $(B)/diffusion.pc $(DESTDIR)$(PREFIX)/share/pkgconfig/

uninstall:                      ## takes both away again
	rm -f $(DESTDIR)$(PREFIX)/include/diffusion.h
	rm -f $(DESTDIR)$(PREFIX)/share/pkgconfig/diffusion.pc

clean:                          ## removes build/
	rm -rf build

help:                           ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

# ---- how things are built --------------------------------------------------------------

compile = @printf '  CC   %s\n' $@ && \
          $(cc) $(CFLAGS) $(SAN) $(CPPFLAGS) -I. -MMD -MP -MT $@ -MF $@.d
cc      = $(CC)
double  = -DDIFFUSION_DOUBLE
linked  = $(filter-out $(2:%=$(B)/%$(3)),$(1:%=$(B)/%$(3)))

$(B)/diffusion_f.o: tests/impl.c $(B)/flags
	$(compile) -c $< -o $@
$(B)/diffusion_d.o: tests/impl.c $(B)/flags
	$(compile) $(double) -c $< -o $@

# Tests that link the library, then those that hold it.
$(call linked,$(tests),$(tests_a),_f): $(B)/%_f: tests/%.c $(B)/diffusion_f.o
	$(compile) $< $(B)/diffusion_f.o -o $@ $(LDLIBS)
$(call linked,$(tests),$(tests_a),_d): $(B)/%_d: tests/%.c $(B)/diffusion_d.o
	$(compile) $(double) $< $(B)/diffusion_d.o -o $@ $(LDLIBS)
$(tests_a:%=$(B)/%_f): $(B)/%_f: tests/%.c $(B)/flags
	$(compile) $< -o $@ $(LDLIBS)
$(tests_a:%=$(B)/%_d): $(B)/%_d: tests/%.c $(B)/flags
	$(compile) $(double) $< -o $@ $(LDLIBS)

# Examples and the benchmark, float. Where stb_image_write.h is, or that the examples do
# without, stands in stb.flags.
vpath %.c examples tests/bench
$(call linked,$(others),$(others_a)): $(B)/%: %.c $(B)/diffusion_f.o
	$(compile) $(stb) $< $(B)/diffusion_f.o -o $@ $(LDLIBS)
$(others_a:%=$(B)/%): $(B)/%: %.c $(B)/flags
	$(compile) $(stb) $< -o $@ $(LDLIBS)
$(B)/06_mpi: cc = OMPI_CC="$(CC)" MPICH_CC="$(CC)" mpicc
$(examples): stb = @$(B)/stb.flags
$(examples): $(B)/stb.flags
$(B)/stb.flags: FORCE
	@sh examples/find_stb.sh $@ "$(STB)"

# Compiler and flags: rewritten when they change, so that everything is built again.
settings = $(CC) $(CFLAGS) $(SAN) $(CPPFLAGS) $(LDLIBS)
$(B)/flags: FORCE
	@mkdir -p $(B)
	@echo '$(settings)' | cmp -s - $@ || echo '$(settings)' >$@
$(B)/diffusion.pc: diffusion.h FORCE
	@mkdir -p $(B)
	@version=$$(awk '/^#define DF_VERSION_(MAJOR|MINOR|PATCH) / { v = v s $$3; s = "." } \
	  END { print v }' diffusion.h); \
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' \
	  'Name: diffusion.h' 'Description: diffusion models in one C header' \
	  "Version: $$version" 'Cflags: -I$${includedir}' 'Libs: -lm -lpthread' >$@

-include $(wildcard $(B)/*.d)
