"""The intermediate representation between quantizer and exporters."""
