"""Tables for regression: our TFDS builders and CSV files, and scaling learned from training rows.

Every statistic (the mean that fills a gap, the texts of a column, the scale) is learned from the training table, so
that no test row influences training:

    train, test = load_table("diabetes", "train"), load_table("diabetes", "test")
    features, scaler = fit_features(train), TargetScaler.fit(train.targets)
    features.transform(test), scaler.to_unit(test.targets)
"""

from jaxrl_reason.data.tables.load import load_table, Table
from jaxrl_reason.data.tables.scaling import FeatureScaler, fit_features, TargetScaler
