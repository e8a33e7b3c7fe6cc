"""What a study is: slots, origins, samplers, controls, and where it stands."""
