"""The analysis of a sweep: statistics, headline numbers, the paper's claims, every gated layer, the sweep's file."""
