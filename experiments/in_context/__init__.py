"""In-context learning of unseen random automata with Memory Mosaics."""
