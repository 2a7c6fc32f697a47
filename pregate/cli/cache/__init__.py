"""The policy laboratory behind `pregate bench cache`: recordings of steps, policies, replays."""
