"""The stages of a study, one readable function each."""
