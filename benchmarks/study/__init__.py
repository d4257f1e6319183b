"""Study on real text: how well the methods learn a classification, at equal budgets and over several seeds."""
