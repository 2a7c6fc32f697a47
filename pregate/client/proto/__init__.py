"""The interface (`pregate.proto`) and the code generated from it by `make proto`; do not edit the latter."""
