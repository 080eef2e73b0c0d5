"""The dialects, one module each; GPTQ's and AutoRound's differ in a few lines and share one."""
