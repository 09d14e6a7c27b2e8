"""The wire format: kairos.proto and the code generated from it (`make proto`)."""
