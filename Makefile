# Each target first finds or fetches protoc and etcd (scripts/tools), so a new machine needs only
# Rust.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help tools demo chaos test test-etcds check fuzz

# The start of a recipe, in the same shell as its commands. Only tests need more than one etcd.
WITH_TOOLS = set -eu; tools=$$(scripts/tools required); eval "$$tools"; export PROTOC ETCD;
WITH_ETCDS = set -eu; tools=$$(scripts/tools); eval "$$tools"; \
	export PROTOC ETCD ETCD_3_4 ETCD_NEWEST ETCD_3_6 ETCD_3_7;

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

tools: ## find or fetch protoc and etcd, and print where they are
	@scripts/tools

demo: ## a fleet of greeters on a real etcd: joining, leaving, crashing; about 20 seconds
	@$(WITH_TOOLS) cargo build --quiet --examples; cargo run --quiet --example demo

# bash has a variable `SECONDS` too; make takes it from its command line and environment.
chaos: ## random faults on etcd, servers and clients, and a verdict; SEED=, SECONDS= (180), LOGS=folder
	@$(WITH_TOOLS) cargo run --quiet --package chaos -- \
	$(if $(SEED),--seed '$(SEED)') $(if $(SECONDS),--seconds '$(SECONDS)') $(if $(LOGS),--logs '$(LOGS)')

# Most tests wait for servers, so more of them run at once than there are cores.
TEST_THREADS ?= 12
WITH_THREADS = export RUST_TEST_THREADS=$${RUST_TEST_THREADS:-$(TEST_THREADS)};

test: ## all tests, against real etcd servers
	@$(WITH_ETCDS) $(WITH_THREADS) cargo test --workspace --all-features

# The tests of the promises that depend on etcd.
ETCD_TESTS = client:: registrar:: directory:: testing:: end_to_end:: migration:: named_clients:: \
	idle_etcd:: partitions:: reasons::

test-etcds: ## the tests that depend on etcd, on the etcds that `make test` does not use
	@$(WITH_ETCDS) $(WITH_THREADS) for variable in ETCD_3_4 ETCD_3_6 ETCD_3_7; do \
	etcd=$${!variable}; \
	if [ "$$etcd" = none ]; then echo "== left out: $$variable is none"; continue; fi; \
	echo "== $$variable: $$("$$etcd" --version | head -n 1)"; \
	ETCD=$$etcd cargo test --workspace --all-features --test it -- $(ETCD_TESTS); \
	done

check: ## formatting, lints and documentation, warnings as errors
	@$(WITH_TOOLS) cargo fmt --all --check; \
	cargo clippy --workspace --all-targets --all-features -- -D warnings; \
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --all-features

# The time for each decoder.
FUZZ_SECONDS ?= 300

fuzz: ## fuzz each decoder for FUZZ_SECONDS (300); needs nightly Rust and cargo-fuzz
	@$(WITH_TOOLS) targets=$$(cargo +nightly fuzz list); for target in $$targets; do \
	echo "== $$target"; \
	mkdir -p fuzz/corpus/$$target; \
	cargo +nightly fuzz run $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
	-dict=fuzz/json.dict -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1; \
	done
