"""One file per op: its contract, torch reference, argument checks, autograd and public function."""
