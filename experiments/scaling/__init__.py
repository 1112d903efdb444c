"""What training costs on many devices."""
