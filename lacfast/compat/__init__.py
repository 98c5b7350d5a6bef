"""Other trainers' functions on lacfast's ops: same names, arguments and results; the import changes."""
