"""The last pass: with all codes frozen, super-block scales, norm gains and existing biases are optimised."""
