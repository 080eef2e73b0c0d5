"""Which type every matrix gets, where only the size of the whole is given: measured, then chosen."""
